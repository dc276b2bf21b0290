"""The vocabulary kernels are written in: a thin layer over TVM's IRBuilder with SIMD values as Python objects.

Kernels are Python functions that *emit* TIR. Python loops unroll; ``T.serial`` and ``T.parallel`` make loops in the code.
A vector is a TIR expression of ``lanes`` float32 values. The multiply-adds of a sum are explicit intrinsics, and the paths
that a row can take (tile, single row) emit the same expressions: LLVM may contract a product and a sum that stand next to
each other, and must do so in all of them or in none, or batch invariance is lost. The tests compare bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.errors import InternalError
from llmc.schedules.protocol import Dim, TensorSpec
from llmc.targets.base import Target

Expr = Any

PARALLEL_WORK = 32768
"""Elementary operations below which starting the other threads (a few microseconds) costs more than it saves."""


class Symbols:
    """The symbolic dimensions of one kernel: a name (``"n"``, or ``"b+1"``) to its int64 expression."""

    def __init__(self) -> None:
        self._vars: dict[str, Expr] = {}

    def dim(self, dim: Dim) -> Expr:
        if isinstance(dim, int):
            return tirx.const(dim, "int64")
        parts = re.fullmatch(r"\s*(\w+)\s*(?:\+\s*(\d+)\s*)?", dim)
        if parts is None:
            raise InternalError(f"a kernel dimension must be a name or name+number, found {dim!r}")
        name, offset = parts[1], int(parts[2] or 0)
        var = self._vars.setdefault(name, tirx.Var(name, "int64"))
        return var + offset if offset else var


@contextmanager
def function(name: str) -> Iterator[Callable[[], Any]]:
    """Emit a PrimFunc. Yields a callable that returns it once the block has ended."""
    builder = IRBuilder()
    with builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
        yield builder.get


def arguments(symbols: Symbols, **specs: TensorSpec) -> list[Expr]:
    """Declare the function's buffers in order and return them."""
    handles = [T.arg(name, T.handle()) for name in specs]
    return [
        T.match_buffer(handle, [symbols.dim(d) for d in spec.shape], spec.dtype)
        for handle, spec in zip(handles, specs.values(), strict=True)
    ]


def i64(value: Expr) -> Expr:
    """An index as int64, whatever it was (block tables and lengths are int32)."""
    return tirx.const(value, "int64") if isinstance(value, int) else tirx.Cast("int64", value)


def f32(value: float) -> Expr:
    return tirx.const(value, "float32")


def ceildiv(a: Expr, b: int) -> Expr:
    return tirx.floordiv(a + (b - 1), b)


def local(lanes: int, count: int = 1, dtype: str = "float32") -> Expr:
    """A thread's own buffer of ``count`` vectors. One vector per buffer becomes a register; above 1 KB it is a workspace.

    Its scope is TVM's "global": only that one is put on the stack on a CPU, any other becomes a heap allocation.
    """
    return T.alloc_buffer((lanes * count,), dtype)


def span(start: Expr, lanes: int) -> Expr:
    """The index of ``lanes`` consecutive elements."""
    return start if lanes == 1 else tirx.Ramp(start, 1, lanes)


def store(buffer: Expr, value: Expr, *index: Expr, lanes: int = 1) -> None:
    """Store ``value`` at ``index``, whose last part starts ``lanes`` consecutive elements."""
    T.buffer_store(buffer, value, [*index[:-1], span(index[-1], lanes)])


def read(buffer: Expr, *index: Expr, lanes: int = 1) -> Expr:
    """Load ``lanes`` consecutive elements in the buffer's own dtype."""
    return buffer[(*index[:-1], span(index[-1], lanes))]


def prefetch(buffer: Expr, *index_and_count: Expr) -> None:
    """Ask for memory ahead of time, a cache line at a time: ``prefetch(buffer, *index, count)``, ``count`` elements of a buffer
    from ``index`` on. Where there is none to be read, nothing happens."""
    *index, count = index_and_count
    read_once, near, data = (tirx.const(v, "int32") for v in (0, 3, 1))
    for line in range(0, count, 64 * 8 // tvm.DataType(str(buffer.ty.dtype)).bits):
        address = tirx.address_of(buffer[(*index[:-1], index[-1] + line)])
        T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, read_once, near, data))


def bind(value: Expr) -> Expr:
    """Evaluate once: the value as a variable."""
    return T.bind(value)


def keep(value: Expr) -> Expr:
    """Like :func:`bind`, by way of a register's buffer that TVM does not look through.

    TVM's analyses substitute bound values into each other: a chain in which each is used several times grows exponentially.
    """
    lanes = _lanes(value)
    register = local(lanes, dtype=str(value.ty.dtype).split("x")[0])
    store(register, value, 0, lanes=lanes)
    return bind(read(register, 0, lanes=lanes))


def when(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """Emit ``if condition: then() else: otherwise()``."""
    with T.If(condition):
        with T.Then():
            then()
        if otherwise is not None:
            with T.Else():
                otherwise()


def parallel_if(extent: Expr, work: int, body: Callable[[Expr], None]) -> None:
    """Run ``body(i)`` for i < extent, on all threads if ``extent * work`` elementary operations are worth the start."""

    def threads() -> None:
        with T.parallel(0, extent) as i:
            body(i)

    def alone() -> None:
        with T.serial(0, extent) as i:
            body(i)

    when(extent * work >= PARALLEL_WORK, threads, alone)


def elements(count: int, lanes: int) -> list[tuple[int, int]]:
    """Cut ``count`` elements into (start, lanes) pieces: full vectors, then smaller powers of two."""
    pieces, start = [], 0
    while start < count:
        while lanes > count - start:
            lanes //= 2
        pieces.append((start, lanes))
        start += lanes
    return pieces


def each_vector(count: int, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """Run ``body(start, lanes)`` over ``count`` elements: a loop over full vectors, then the rest in smaller ones."""
    full = count // lanes
    if full > 0:
        with T.serial(0, full) as i:
            body(i * lanes, lanes)
    for start, width in elements(count - full * lanes, lanes):
        body(tirx.const(full * lanes + start, "int64"), width)


class Simd:
    """Vector arithmetic for one target. ``lanes`` is the widest float32 vector, ``has_fma`` a fused multiply-add."""

    def __init__(self, target: Target) -> None:
        self.lanes = target.lanes(32)
        self.registers = target.vector_registers
        self.has_fma = not target.triple.startswith("x86_64") or "fma" in target.features
        self.has_half = not target.triple.startswith("x86_64") or "f16c" in target.features

    def widest(self, count: int) -> int:
        """The widest vector of at most ``count`` elements (a power of two)."""
        lanes = self.lanes
        while lanes > count:
            lanes //= 2
        return lanes

    def splat(self, value: Expr, lanes: int) -> Expr:
        value = f32(value) if isinstance(value, float | int) else value
        return value if lanes == 1 else tirx.Broadcast(value, lanes)

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """a · b + c, rounded once where the machine can."""
        return tirx.call_llvm_pure_intrin(a.ty.dtype, "llvm.fma", a, b, c) if self.has_fma else a * b + c

    def load(self, buffer: Expr, *index: Expr, lanes: int = 1) -> Expr:
        """Load ``lanes`` elements of float32, float16 or bfloat16 as float32."""
        return self.widen(read(buffer, *index, lanes=lanes), str(buffer.ty.dtype), lanes)

    def widen(self, value: Expr, dtype: str, lanes: int) -> Expr:
        """``lanes`` values of float32, float16 or bfloat16 as float32."""
        if dtype == "float32":
            return value
        if dtype == "float16" and not self.has_half:
            return _half_to_float(tirx.reinterpret(vector("uint16", lanes), value), lanes)
        if dtype == "bfloat16":
            bits = tirx.Cast(vector("uint32", lanes), tirx.reinterpret(vector("uint16", lanes), value))
            return tirx.reinterpret(vector("float32", lanes), bits << words(16, lanes))
        return tirx.Cast(vector("float32", lanes), value)

    def narrow(self, value: Expr, dtype: str, lanes: int) -> Expr:
        """float32 to the storage dtype, rounded to nearest even."""
        if dtype == "float32":
            return value
        if dtype == "float16" and not self.has_half:
            return tirx.reinterpret(vector("float16", lanes), _float_to_half(bind(value), lanes))
        if dtype == "bfloat16":
            bits = bind(tirx.reinterpret(vector("uint32", lanes), value))
            rounded = bits + ((bits >> words(16, lanes)) & words(1, lanes)) + words(0x7FFF, lanes)
            upper = tirx.Cast(vector("uint16", lanes), rounded >> words(16, lanes))
            return tirx.reinterpret(vector("bfloat16", lanes), upper)
        return tirx.Cast(vector(dtype, lanes), value)

    def sums(self, vectors: Sequence[Expr]) -> Expr:
        """Horizontal sums of a power-of-two number of equally wide vectors, as one vector with a lane for each.

        The tree is always lane i + lane i + width/2, halving the width: one element's order of additions does not
        depend on how many vectors are summed together.
        """
        values, width = list(vectors), _lanes(vectors[0])
        pieces = 1
        while width > 1:
            half = width // 2
            if len(values) > 1:
                pairs = zip(values[0::2], values[1::2], strict=True)
                values = [bind(_halves(a, b, pieces, width, 0) + _halves(a, b, pieces, width, half)) for a, b in pairs]
                pieces *= 2
            else:
                values = [bind(_halves(values[0], None, pieces, width, 0) + _halves(values[0], None, pieces, width, half))]
            width = half
        return values[0] if len(values) == 1 else bind(shuffle(values, range(pieces * len(values))))

    def total(self, value: Expr) -> Expr:
        """The sum of a vector's lanes, in the tree of :meth:`sums`."""
        return self.sums([value])

    def largest(self, value: Expr) -> Expr:
        """The maximum of a vector's lanes."""
        width = _lanes(value)
        value = keep(value)
        while width > 1:
            half = width // 2
            value = bind(tirx.max(_halves(value, None, 1, width, 0), _halves(value, None, 1, width, half)))
            width = half
        return value


def vector(dtype: str, lanes: int) -> str:
    """The name of a vector type: ``float32x16``, or the plain dtype for one lane."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _lanes(value: Expr) -> int:
    match = re.fullmatch(r"[a-z]+\d+x(\d+)", str(value.ty.dtype))
    return int(match[1]) if match else 1


def shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """The named lanes of the concatenated vectors."""
    return tirx.Shuffle(list(vectors), [tirx.const(i, "int32") for i in lanes])


def _halves(a: Expr, b: Expr | None, pieces: int, width: int, offset: int) -> Expr:
    """From each of the ``pieces`` of ``width`` lanes in a (and b), the half that starts at ``offset``."""
    count = pieces * (1 if b is None else 2)
    take = [p * width + offset + i for p in range(count) for i in range(width // 2)]
    return shuffle([a] if b is None else [a, b], take)


def words(value: int, lanes: int) -> Expr:
    """An unsigned 32-bit constant in every lane."""
    constant = tirx.const(value, "uint32")
    return constant if lanes == 1 else tirx.Broadcast(constant, lanes)


def _half_to_float(bits: Expr, lanes: int) -> Expr:
    """IEEE half bits to float32 by integer arithmetic, for machines without the conversion (x86-64 before v3)."""
    floats = vector("float32", lanes)
    wide = bind(tirx.Cast(vector("uint32", lanes), bits))
    magnitude = bind((wide & words(0x7FFF, lanes)) << words(13, lanes))
    # Shifted into place the exponent is too small by 127 - 15 = 112; the product with 2^112 makes subnormals right as well.
    scale = tirx.reinterpret(floats, words((127 + 112) << 23, lanes))
    scaled = bind(tirx.reinterpret(vector("uint32", lanes), tirx.reinterpret(floats, magnitude) * scale))
    special = tirx.Select(magnitude >= words(0x7C00 << 13, lanes), scaled | words(0x7F800000, lanes), scaled)
    return tirx.reinterpret(floats, special | ((wide & words(0x8000, lanes)) << words(16, lanes)))


def _float_to_half(value: Expr, lanes: int) -> Expr:
    """float32 to IEEE half bits, to nearest even, by integer arithmetic: the inverse of :func:`_half_to_float`."""
    floats, integers = vector("float32", lanes), vector("uint32", lanes)
    bits = bind(tirx.reinterpret(integers, value))
    magnitude = bind(bits & words(0x7FFFFFFF, lanes))
    # Subnormal results: adding 0.5 lets the float addition do the rounding at the right bit.
    small = tirx.reinterpret(floats, magnitude) + tirx.reinterpret(floats, words(0x3F000000, lanes))
    subnormal = tirx.reinterpret(integers, small) - words(0x3F000000, lanes)
    odd = (magnitude >> words(13, lanes)) & words(1, lanes)
    normal = (magnitude - words(112 << 23, lanes) + words(0xFFF, lanes) + odd) >> words(13, lanes)
    finite = tirx.Select(magnitude < words(113 << 23, lanes), subnormal, normal)
    infinite = tirx.Select(magnitude > words(0x7F800000, lanes), words(0x7E00, lanes), words(0x7C00, lanes))
    result = tirx.Select(magnitude >= words(0x477FF000, lanes), infinite, finite)
    return tirx.Cast(vector("uint16", lanes), result | ((bits & words(0x80000000, lanes)) >> words(16, lanes)))
