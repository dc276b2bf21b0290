"""Integer dot products of unsigned weight codes with int8 activations, per instruction set.

One vector holds four consecutive codes (a quad) of as many rows as it has 32-bit lanes; :meth:`Dot.products` multiplies the
quads of a stretch of k with the activations' quads, each broadcast to all rows, and returns one int32 sum per row.

=================== ===========================================================================================
AVX512-VNNI,        ``vpdpbusd``: unsigned · signed bytes, four products added to a 32-bit lane
AVX-VNNI
AVX2, AVX-512BW     ``vpmaddubsw`` adds two products in 16 bits, as many steps as cannot overflow, then ``vpmaddwd``
                    by ones
AVX2, 8 bits        the same of |code - 128| and the activation with that one's sign (``vpsignb``): at most 2 · 128 · 127,
                    which does not saturate
SSE2, and 8 bits    even and odd bytes widened, ``pmaddwd``
with AVX-512BW
NEON dotprod        ``sdot``: signed · signed; 8-bit codes are moved to -128..127 by flipping a bit
NEON i8mm           ``smmla``: eight bytes of two weight rows · those of two rows of x, four sums; ``sdot`` for a single row of x
others              32-bit multiplications
=================== ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tvm import tirx

from llmc.schedules.cpu.emit import Simd, bind, local, read, shuffle, store, vector
from llmc.schedules.cpu.layout_panel import PLANES, QUADS, ROWS
from llmc.targets.base import Target

Expr = Any
Quads = Callable[[int], Expr]
"""A quad of codes by its number in the block, in a register."""
Apart = Callable[[Callable[[], None]], None]
TURNS = (2, 4, 8)
"""Quads of a turn: the more, the more of them are in registers."""
VNNI = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256"}
MADD_BYTES = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw"}
MADD_WORDS = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}
SIGN = "llvm.x86.avx2.psign.b"
SDOT = "llvm.aarch64.neon.sdot.v4i32.v16i8"
SMMLA = "llvm.aarch64.neon.smmla.v4i32.v16i8"


class Dot:
    """The instruction set's way. ``lanes``: rows in a vector; ``parts``: vectors that make a panel."""

    def __init__(self, simd: Simd, target: Target, bits: int, turn: int = TURNS[0]) -> None:
        """``turn``: one of :data:`TURNS`."""
        self.simd, self.bits, self.turn = simd, bits, turn
        self.lanes = min(simd.lanes, ROWS)
        self.parts = ROWS // self.lanes
        self.how = self._instructions(target)
        self.bias = 128 if self.how in ("sdot", "smmla", "signs") and bits == 8 else 0
        """What was subtracted from the codes: the products are those of code - bias."""

    @property
    def turns(self) -> tuple[int, ...]:
        """The values of ``turn`` that make a difference: which is the fastest depends on the scheme."""
        return TURNS if self.how in ("bytes", "signs") else TURNS[:1]

    def _instructions(self, target: Target) -> str:
        has = set(target.features)
        if target.triple.startswith("x86_64"):
            if self.lanes in VNNI and ("avx512_vnni" in has or (self.lanes == 8 and "avx_vnni" in has)):
                return "vnni"
            if self.lanes in MADD_BYTES and self.bits < 8:
                return "bytes"
            return "signs" if self.lanes == 8 else "words"
        if "asimddp" in has:
            return "smmla" if "i8mm" in has else "sdot"
        return "multiply"

    def codes(self, panels: Expr, panel: Expr, block: Expr, part: int) -> list[Expr]:
        """The eight quads of the block at byte ``block`` of a panel, for the rows of vector ``part``."""
        return [self.quad(panels, panel, block, part, q) for q in range(QUADS)]

    def quad(self, panels: Expr, panel: Expr, block: Expr, part: int, number: int) -> Expr:
        """One of :meth:`codes`."""
        width = 4 * self.lanes
        code, low, start = None, 0, 0
        for plane in PLANES[self.bits]:
            v, f = divmod(number, 8 // plane)
            value = bind(read(panels, panel, block + (start + 64 * v + part * width), lanes=width))
            bits = value >> _bytes(f * plane, width) if f else value
            bits = bits & _bytes((1 << plane) - 1, width) if plane < 8 and f < 8 // plane - 1 else bits
            code = bits if code is None else code | (bits << _bytes(low, width))
            low, start = low + plane, start + 64 * plane
        return bind(code ^ _bytes(self.bias, width) if self.bias else code)

    def of_rows(
        self, starts: Sequence[Expr], quads: Quads, numbers: range, codes: Expr, places: Sequence[Expr], apart: Apart
    ) -> list[Expr]:
        """For each row of x, whose activations are ``codes[place:]``, the products with the quads ``numbers`` added to its start
        (an int32 for all lanes). Rows take turns at every few quads: an instruction that adds to a sum waits for the one before,
        and the other rows' need not. ``apart``: emits a turn so that the turns stay apart."""
        if self.how in ("bytes", "signs"):
            return self._madd(starts, quads, numbers, codes, places, apart)
        taken = [quads(q) for q in numbers]
        pairs = len(places) // 2 if self.how == "smmla" else 0
        found = self._of_pairs(starts[: 2 * pairs], taken, codes, places[: 2 * pairs]) if pairs else []
        starts, places = starts[2 * pairs :], places[2 * pairs :]
        sums = [tirx.Broadcast(start, self.lanes) for start in starts]
        for q, quad in enumerate(taken):
            for i, place in enumerate(places):
                sums[i] = self.products(sums[i], quad, _broadcast(codes, place + 4 * q, self.lanes))
        return found + sums

    def _of_pairs(self, starts: Sequence[Expr], quads: Sequence[Expr], codes: Expr, places: Sequence[Expr]) -> list[Expr]:
        """The same of an even number of rows: a 2 x 2 matrix of sums for two weight rows and two rows of x."""
        rows = range(0, len(places), 2)
        sums = [
            [bind(shuffle([tirx.Broadcast(start, 2) for start in starts[i : i + 2]], [0, 2, 1, 3])) for _ in range(2)] for i in rows
        ]
        for q in range(0, len(quads), 2):
            words = [_as(quad, "int32", 4) for quad in quads[q : q + 2]]
            # Eight columns of weight rows 0 and 1, and of 2 and 3.
            weights = [bind(_as(shuffle(words, [i, 4 + i, i + 1, 5 + i]), "int8", 16)) for i in (0, 2)]
            for total, i in zip(sums, rows, strict=True):
                x = bind(shuffle([read(codes, place + 4 * q, lanes=8) for place in places[i : i + 2]], range(16)))
                for half, weight in enumerate(weights):
                    total[half] = bind(_call("int32x4", SMMLA, total[half], weight, x))
        return [bind(shuffle(total, range(row, 8, 2))) for total in sums for row in range(2)]

    def products(self, start: Expr, quad: Expr, x: Expr) -> Expr:
        """``start`` (int32) + the products of a quad with one of activations, which is an int32 in every lane."""
        return {"vnni": self._vnni, "words": self._madd_words, "sdot": self._sdot, "smmla": self._sdot,
                "multiply": self._multiply}[self.how](start, quad, x)  # fmt: skip

    def _vnni(self, total: Expr, quad: Expr, x: Expr) -> Expr:
        return bind(_call(f"int32x{self.lanes}", VNNI[self.lanes], total, quad, _as(x, "int8", 4 * self.lanes)))

    def _madd(
        self, starts: Sequence[Expr], quads: Quads, numbers: range, codes: Expr, places: Sequence[Expr], apart: Apart
    ) -> list[Expr]:
        """Sums of two products in 16 bits, which are added up in 16 bits for as many quads as cannot overflow. A turn unpacks its
        quads: no more of them than that take registers."""
        words, lanes = 2 * self.lanes, self.lanes
        ones = tirx.Broadcast(tirx.const(1, "int16"), words)
        narrow = [local(words, dtype="int16") for _ in places]
        sums = [local(lanes, dtype="int32") for _ in places]
        for total, start in zip(sums, starts, strict=True):
            store(total, tirx.Broadcast(start, lanes), 0, lanes=lanes)
        steps = self._narrow_steps()

        def turn(taken: range) -> None:
            weights = {q: quads(q) for q in taken}
            for q in taken:
                for place, part, total in zip(places, narrow, sums, strict=True):
                    pairs = self._pairs(weights[q], _broadcast(codes, place + 4 * (q - numbers.start), lanes))
                    if (q - numbers.start) % steps:
                        pairs = read(part, 0, lanes=words) + pairs
                    if (q - numbers.start + 1) % steps and q + 1 < numbers.stop:
                        store(part, pairs, 0, lanes=words)
                    else:
                        wide = _call(f"int32x{lanes}", MADD_WORDS[lanes], pairs, ones)
                        store(total, read(total, 0, lanes=lanes) + wide, 0, lanes=lanes)

        together = self.turn if len(places) > 1 else len(numbers)
        for low in range(numbers.start, numbers.stop, together):
            apart(partial(turn, range(low, min(low + together, numbers.stop))))
        return [bind(read(total, 0, lanes=lanes)) for total in sums]

    def _narrow_steps(self) -> int:
        """Quads whose products with 7-bit activations add up in 16 bits."""
        return 1 if self.how == "signs" else int(32767 // (2 * 127 * ((1 << self.bits) - 1)))

    def _pairs(self, quad: Expr, x: Expr) -> Expr:
        """The products of a quad with one of activations, sums of two in 16 bits."""
        width = 4 * self.lanes
        x = _as(x, "int8", width)
        if self.how == "signs":
            code = bind(_as(quad, "int8", width))
            quad = _call(f"int8x{width}", "llvm.abs", code, tirx.const(False, "bool"))
            x = _call(f"int8x{width}", SIGN, x, code)
        return _call(f"int16x{2 * self.lanes}", MADD_BYTES[self.lanes], quad, x)

    def _madd_words(self, total: Expr, quad: Expr, x: Expr) -> Expr:
        words, name = 2 * self.lanes, MADD_WORDS[self.lanes]
        eight = tirx.Broadcast(tirx.const(8, "int16"), words)
        w, a = bind(_as(quad, "uint16", words)), bind(_as(x, "int16", words))
        even = _as(w & tirx.Broadcast(tirx.const(255, "uint16"), words), "int16", words)
        odd = _as(w >> tirx.Broadcast(tirx.const(8, "uint16"), words), "int16", words)
        total = total + _call(f"int32x{self.lanes}", name, even, (a << eight) >> eight)
        return bind(total + _call(f"int32x{self.lanes}", name, odd, a >> eight))

    def _sdot(self, total: Expr, quad: Expr, x: Expr) -> Expr:
        return bind(_call("int32x4", SDOT, total, _as(quad, "int8", 16), _as(x, "int8", 16)))

    def _multiply(self, total: Expr, quad: Expr, x: Expr) -> Expr:
        w = bind(_as(quad, "uint32", self.lanes))
        for byte in range(4):
            code = (w >> _words(8 * byte, self.lanes)) & _words(255, self.lanes)
            up, down = (tirx.Broadcast(tirx.const(s, "int32"), self.lanes) for s in (24 - 8 * byte, 24))
            total = bind(total + _as(code, "int32", self.lanes) * ((x << up) >> down))
        return total


def _broadcast(codes: Expr, at: Expr, lanes: int) -> Expr:
    """Four int8 activations as one int32, in every lane."""
    return tirx.Broadcast(tirx.reinterpret("int32", read(codes, at, lanes=4)), lanes)


def _call(dtype: str, name: str, *args: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(dtype, name, *args)


def _as(value: Expr, dtype: str, lanes: int) -> Expr:
    return tirx.reinterpret(vector(dtype, lanes), value)


def _bytes(value: int, lanes: int) -> Expr:
    return tirx.Broadcast(tirx.const(value, "uint8"), lanes)


def _words(value: int, lanes: int) -> Expr:
    return tirx.Broadcast(tirx.const(value, "uint32"), lanes)
