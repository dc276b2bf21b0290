"""``llmc tune``: find configurations that make a model faster, and keep them as records that compiling looks up.

:mod:`~llmc.tune.task` says which kernels a model has and what they are worth, :mod:`~llmc.tune.search` and
:mod:`~llmc.tune.cost_model` what to try next, :mod:`~llmc.tune.worker` tries it in a process of its own, and
:mod:`~llmc.tune.tuner` drives them. :mod:`~llmc.tune.validate` then decides in the model (:mod:`~llmc.tune.subject` compiles it,
:mod:`~llmc.tune.turns` runs it, :mod:`~llmc.tune.compare` says what is certain), :mod:`~llmc.tune.whole` tries choices for all of
it, and :mod:`~llmc.tune.session` is the order of these. :mod:`~llmc.tune.pack` serves machines that have no compiler.
"""
