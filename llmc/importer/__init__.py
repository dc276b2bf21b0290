"""Reading models: from a name on the command line to a flat graph and a table of its parameters.

``resolve`` finds the model, ``huggingface`` and ``gguf`` read its two formats into a :class:`~llmc.importer.source.ModelSource`,
``export`` traces it with the ops of ``boundary`` left whole, ``walker`` and ``aten`` turn the trace into Relax, and
``model.import_model`` is the whole of it. ``params`` holds no weight: every tensor is read when the artifact is written.
"""
