"""``llmc tune``: measure the configurations of a model's kernels and keep the fastest as records that compiling looks up.

:mod:`~llmc.tune.task` says which kernels a model has and what they are worth, :mod:`~llmc.tune.search` and
:mod:`~llmc.tune.cost_model` what to try next, :mod:`~llmc.tune.worker` tries it in a process of its own,
:mod:`~llmc.tune.tuner` drives them, and :mod:`~llmc.tune.pack` does the same for a machine that has no compiler.
"""
