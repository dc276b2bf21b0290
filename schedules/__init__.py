"""Kernel families: templates with a search space, one module per family (see :mod:`llmc.schedules.protocol`)."""
