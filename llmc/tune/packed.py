"""Quantized weights as inputs: random matrices, rounded and packed as compiling does it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from llmc import targets
from llmc.errors import UnsupportedError
from llmc.passes.quantize.round_to_nearest import quantize
from llmc.passes.quantize.scheme import scheme
from llmc.schedules import layouts
from llmc.schedules.protocol import KernelCall


@lru_cache(maxsize=1)
def packed_weight(call: KernelCall, seed: int = 0) -> tuple[np.ndarray, ...]:
    """The parts of a random weight in the call's layout, in the order of its operands.

    Raises UnsupportedError for an unknown layout.
    """
    name, o, k = str(call.attr("layout")), int(call.attr("o")), int(call.attr("k"))
    kind = name.partition(".")[0]
    for spec in targets.known_specs():
        if spec.partition(":")[0] != kind or spec == "cuda":  # plain "cuda" asks for a GPU
            continue
        for layout in layouts.of_target(targets.parse(spec)):
            if name == layout.NAME:
                weight = np.random.default_rng(seed).standard_normal((o, k), np.float32) * np.float32(k**-0.5)
                return tuple(layout.pack(quantize(weight, scheme(str(call.attr("scheme"))))).values())
    raise UnsupportedError(f"tuning knows no weight layout {name!r}: leave {call.op} out with --kernels")
