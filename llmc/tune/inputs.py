"""Inputs of a kernel call, the same on every machine, and the part of its result that is compared. NumPy alone.

Tensors are held as :func:`llmc.runtime.tensors.storage_dtype` says: bfloat16 as the upper 16 bits of a float32, in uint16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.errors import UnsupportedError
from llmc.kv_layout import page_layout
from llmc.runtime.tensors import storage_dtype
from llmc.schedules.protocol import KernelCall, TensorSpec

Array = np.ndarray
PERIOD = 1_048_573
"""Distinct random numbers of a tensor; a larger one repeats them. A prime, so that no two rows of a matrix are alike."""

COMPARED_ROWS, COMPARED_OUTPUTS = 16, 256
"""How much of a matrix product is compared: the reference in float64 of all of it would take longer than the kernel's search."""


def sizes(call: KernelCall, device_kind: str) -> list[dict[str, int]]:
    """The sizes of the call's symbols that it is timed at.

    Decode: one sequence and a batch of eight; extend: a prompt of 512, on a GPU one of 2048 too. Attention has as many positions as
    ``context`` says, which is no dimension of a tensor: a GPU divides them among blocks by the batch and the context, so there it
    is timed over a long context and with many sequences too.
    """
    prompts = (512,) if device_kind == "cpu" else (512, 2048)
    if call.op == "llmc.attend":
        more = [] if device_kind == "cpu" else [(1, 1, 8192), (64, 64, 1024)]
        runs = [(1, 1, 1024), (8, 8, 1024), *more] if call.phase == "decode" else [(1, n, n) for n in prompts]
        return [_paged(call, batch, rows, context) for batch, rows, context in runs]
    names = {d for spec in (*call.args, call.result) for d in spec.shape if isinstance(d, str)}
    if len(names) != 1:
        raise UnsupportedError(
            f"{call.op} has the sizes {', '.join(sorted(names))}, and tuning knows calls with one: leave it out with --kernels"
        )
    name = names.pop()
    return [{name: n} for n in ((1, 8) if call.phase == "decode" else prompts)]


def at_rows(call: KernelCall, rows: int) -> dict[str, int]:
    """Sizes of the call's symbols in a step of ``rows`` rows: as many sequences with few tokens, or one prompt."""
    if call.op == "llmc.attend":
        return _paged(call, rows, rows, SHORT) if call.phase == "decode" else _paged(call, 1, rows, rows)
    return {"n": rows}


SHORT = 64
"""Positions of a sequence whose attention is not what is timed."""


def _paged(call: KernelCall, batch: int, rows: int, context: int) -> dict[str, int]:
    blocks = -(-context // int(call.attr("page_size")))
    return {"n": rows, "b": batch, "b+1": batch + 1, "m": blocks, "num_pages": batch * blocks, "context": context}


def random(spec: TensorSpec, symbols: dict[str, int], rng: np.random.Generator, scale: float = 1.0) -> Array:
    """Standard normal numbers times ``scale``, rounded to the dtype."""
    shape = spec.bind(symbols)
    count = int(np.prod(shape))
    values = rng.standard_normal(min(count, PERIOD), dtype=np.float32) * np.float32(scale)
    return np.resize(narrow(values, spec.dtype), count).reshape(shape)


def narrow(values: Array, dtype: str) -> Array:
    """float32 in the storage of ``dtype``, rounded to nearest, ties to even."""
    if dtype != "bfloat16":
        return values.astype(storage_dtype(dtype))
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(array: Array, dtype: str) -> Array:
    """The numbers that an array of storage holds: float32 for every floating-point dtype, else the array."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if dtype in ("float16", "float32") else array


def make(call: KernelCall, symbols: dict[str, int], seed: int = 0, packed: Sequence[Array] = ()) -> list[Array]:
    """The operands of the call. ``packed``: what :func:`packed_parts` gave where there was a compiler, for machines without one.

    Raises UnsupportedError for an op that it does not know.
    """
    maker, rng = _MAKERS.get(call.op), np.random.default_rng(seed)
    if call.op == "llmc.quantized_linear":
        return _quantized_linear(call, symbols, rng, packed or packed_parts(call))
    if call.op in MOE:
        return _moe(call, symbols, rng, packed or packed_parts(call))
    if maker is None:
        raise UnsupportedError(f"tuning knows no inputs for {call.op}: leave it out with --kernels")
    return maker(call, symbols, rng)


def _linear(call: KernelCall, symbols: dict[str, int], rng: np.random.Generator) -> list[Array]:
    k = int(call.args[1].shape[1])
    scales = [1.0, k**-0.5, *([1.0] * (len(call.args) - 2))]
    return [random(spec, symbols, rng, scale) for spec, scale in zip(call.args, scales, strict=True)]


def _attend(call: KernelCall, symbols: dict[str, int], rng: np.random.Generator) -> list[Array]:
    """Pages in random order; the rows of the step are the last ones of each sequence."""
    batch, rows = symbols["b"], symbols["n"] // symbols["b"]
    q, pages, *more = (
        _codes(call, symbols, rng) if spec.dtype == "uint8" else random(spec, symbols, rng)
        for i, spec in enumerate(call.args)
        if i not in (2, 3, 4)
    )
    table = rng.permutation(symbols["num_pages"]).astype(np.int32).reshape(batch, symbols["m"])
    lengths = np.full(batch, symbols["context"], np.int32)
    return [q, pages, table, lengths, np.arange(0, batch + 1, dtype=np.int32) * np.int32(rows), *more]


def _codes(call: KernelCall, symbols: dict[str, int], rng: np.random.Generator) -> Array:
    """Pages of any codes, but for those of fp8 that are no number, and parameters of about 1/50."""
    layout = page_layout(call.attr("kv_scheme"), int(call.attr("page_size")), int(call.args[0].shape[2]), int(call.attr("v_dim")))
    pages = rng.integers(0, 256, call.args[1].bind(symbols), dtype=np.uint8) & np.uint8(0xFE)
    parameters = pages[..., layout.key_parameters :]
    values = np.abs(rng.standard_normal((*parameters.shape[:-1], parameters.shape[-1] // 2), dtype=np.float32)) * np.float32(0.02)
    parameters[...] = narrow(values, "bfloat16").view(np.uint8)
    return pages


def packed_parts(call: KernelCall) -> tuple[Array, ...]:
    """The parts of quantized weights as the compiler packs them; none of calls that need no compiler for their inputs."""
    if call.op not in ("llmc.quantized_linear", "llmc.quantized_moe") or call.attr("layout") == SEPARATE_LAYOUT:
        return ()
    from llmc.tune.packed import packed_experts, packed_weight

    return packed_weight(call) if call.op == "llmc.quantized_linear" else packed_experts(call)


MOE = ("llmc.moe", "llmc.quantized_moe")


def _moe(call: KernelCall, symbols: dict[str, int], rng: np.random.Generator, packed: Sequence[Array]) -> list[Array]:
    """Each row has experts of its own, all different; their weights add up to about one."""
    x, ids, weights, *rest = call.args
    experts = int(call.attr("experts") or rest[0].shape[0])
    rows, top_k = ids.bind(symbols)
    chosen = np.argsort(rng.random((rows, experts)), axis=1)[:, :top_k].astype(np.int32)
    gates = narrow(np.abs(random(TensorSpec(weights.shape, "float32"), symbols, rng, 1 / top_k)), weights.dtype)
    fixed = list(packed) or [random(spec, symbols, rng, int(spec.shape[-1]) ** -0.5) for spec in rest[:2]]
    return [random(x, symbols, rng), chosen, gates, *fixed, *(random(spec, symbols, rng) for spec in rest[len(fixed) :])]


def _quantized_linear(call: KernelCall, symbols: dict[str, int], rng: np.random.Generator, packed: Sequence[Array]) -> list[Array]:
    """Any codes and scales where the layout keeps them apart; else the packed weight."""
    if call.attr("layout") == SEPARATE_LAYOUT:
        return [_part(call, i, spec, symbols, rng) for i, spec in enumerate(call.args)]
    x, *others = (random(spec, symbols, rng) for i, spec in enumerate(call.args) if not 1 <= i <= len(packed))
    return [x, *packed, *others]


SEPARATE_LAYOUT = "gpu.mma"
"""The weights' layout for GPUs (:mod:`llmc.schedules.gpu.layout_mma`): codes in int32, zero points in uint8, scales in floats."""


def _part(call: KernelCall, i: int, spec: TensorSpec, symbols: dict[str, int], rng: np.random.Generator) -> Array:
    if spec.dtype == "int32":
        words = rng.integers(0, 2**32, min(PERIOD, int(np.prod(spec.bind(symbols)))), dtype=np.uint32)
        if str(call.attr("scheme")).startswith("fp8"):
            words &= np.uint32(0xFEFEFEFE)  # no byte is NaN
        return np.resize(words.view(np.int32), spec.bind(symbols))
    if spec.dtype == "uint8":
        return np.resize(rng.integers(0, 8, PERIOD, dtype=np.uint8), spec.bind(symbols))
    of_weight = i > 0 and "n" not in spec.shape
    return random(spec, symbols, rng, int(call.attr("k")) ** -0.5 / 4 if of_weight else 1.0)


_MAKERS: dict[str, Callable[[KernelCall, dict[str, int], np.random.Generator], list[Array]]] = {
    "llmc.linear": _linear,
    "llmc.attend": _attend,
}


KNOWN = frozenset({*_MAKERS, "llmc.quantized_linear", *MOE})
"""Ops that :func:`make` has inputs for."""


def compared(call: KernelCall, symbols: dict[str, int]) -> tuple[Array, Array]:
    """Rows and columns of the result (its first and its last dimension) that are compared with the reference."""
    rows, *_, columns = call.result.bind(symbols)
    rng = np.random.default_rng(1)

    def pick(count: int, most: int) -> Array:
        return np.sort(rng.choice(count, most, replace=False)) if count > most else np.arange(count)

    return pick(rows, COMPARED_ROWS), pick(columns, COMPARED_OUTPUTS)


def expected(
    family: Any, call: KernelCall, symbols: dict[str, int], arrays: list[Array], fused: tuple[Any, KernelCall] | None = None
) -> Array:
    """What the family's reference says for the rows and columns of :func:`compared`, or that of the family and the call that run
    in its place.

    A matrix product is computed for these alone: they depend on no other row of x and on no other row of the weight. (A packed
    weight has no rows to pick before it is unpacked, and attention is computed for all rows.)
    """
    rows, columns = compared(call, symbols)
    parts = []
    for i, (array, spec) in enumerate(zip(arrays, call.args, strict=True)):
        if call.op != "llmc.attend":
            if spec.shape[0] == call.args[0].shape[0]:
                array = array[rows]
            if call.op == "llmc.linear" and i > 0:
                of_weight = i == 1 or array.ndim == 1
                array = array[_outputs(call, columns)] if of_weight else array[:, columns]
        parts.append(widen(array, spec.dtype))
    runs, as_call = fused or (family, call)
    result = runs.reference(as_call, *parts)
    if call.op == "llmc.attend":
        result = result[rows]
    return np.asarray(result if call.op == "llmc.linear" else result[..., columns], np.float32)


def _outputs(call: KernelCall, columns: Array) -> Array:
    """The outputs of the weight that results ``columns`` are of: of a gated layer, those of the gate and of what it gates."""
    outputs, results = int(call.args[1].shape[0]), int(call.result.shape[-1])
    return np.concatenate([columns + start for start in range(0, outputs, results)])


TOLERANCE = {"float32": 2e-4, "float16": 4e-3, "bfloat16": 2e-2}
QUANTIZED = 3e-2
"""Activations are rounded to eight bits there."""


def tolerance(call: KernelCall) -> float:
    """Largest error of a result, in units of the largest value of the reference: that of its coarsest dtype."""
    if call.op in ("llmc.quantized_linear", "llmc.quantized_moe"):
        return QUANTIZED
    return max(TOLERANCE[s.dtype] for s in (*call.args, call.result) if s.dtype in TOLERANCE)


def error(call: KernelCall, symbols: dict[str, int], result: Array, wanted: Array) -> float:
    """The largest absolute error of ``result`` (all of it, in storage) over the largest expected value; NaN if any is NaN."""
    rows, columns = compared(call, symbols)
    found = widen(result[rows][..., columns], call.result.dtype)
    return float(np.max(np.abs(found - wanted)) / max(float(np.max(np.abs(wanted))), 1e-30))
