"""The arithmetic of :mod:`llmc.dialect.kv_codes` as expressions, for vectors of ``lanes`` elements on every target."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from llmc.dialect.kv_codes import TINY
from llmc.kv_layout import KvScheme
from llmc.schedules.cpu.emit import bind, f32, vector, words

Expr = Any


def scale_of(reach: Expr, scheme: KvScheme) -> tuple[Expr, Expr]:
    """The scale of a group and its inverse, from its largest absolute value (with a minimum: how far the largest is above it)."""
    rounded = bind(up(reach * f32(1.0 / scheme.largest)))
    scale = bind(tirx.Select(rounded < f32(TINY), f32(0.0), rounded))
    return scale, bind(tirx.Select(scale > f32(0.0), f32(1.0) / tirx.max(scale, f32(TINY)), f32(0.0)))


def up(value: Expr) -> Expr:
    """A non-negative number to the next bfloat16 value that is not smaller."""
    bits = tirx.reinterpret("uint32", value) + words(0xFFFF, 1)
    return tirx.reinterpret("float32", bits & words(0xFFFF0000, 1))


def down(value: Expr) -> Expr:
    """A number to the next bfloat16 value that is not greater."""
    bits = bind(tirx.reinterpret("uint32", value))
    away = bits + words(0xFFFF, 1) * (bits >> words(31, 1))
    return tirx.reinterpret("float32", away & words(0xFFFF0000, 1))


def upper_half(value: Expr) -> Expr:
    """A parameter, which is a bfloat16 value, as two bytes."""
    return tirx.reinterpret("uint8x2", tirx.Cast("uint16", tirx.reinterpret("uint32", value) >> words(16, 1)))


def parameter(two_bytes: Expr) -> Expr:
    """The inverse of :func:`upper_half`."""
    bits = tirx.Cast("uint32", tirx.reinterpret("uint16", two_bytes))
    return tirx.reinterpret("float32", bits << words(16, 1))


def decode(codes: Expr, scheme: KvScheme, lanes: int) -> Expr:
    """Codes of 8 bits, in uint8, as float32."""
    wide = bind(tirx.Cast(vector("uint32", lanes), codes))
    if scheme.kind == "int":
        # Signed arithmetic: TVM tells LLVM that unsigned subtractions do not wrap.
        sign = tirx.const(0x80, "int32") if lanes == 1 else tirx.Broadcast(tirx.const(0x80, "int32"), lanes)
        return tirx.Cast(vector("float32", lanes), (tirx.reinterpret(vector("int32", lanes), wide) ^ sign) - sign)
    floats = vector("float32", lanes)
    magnitude = bind(wide & words(0x7F, lanes))
    # Exponent and mantissa moved to their places, the exponent's bias corrected. Subnormal numbers are multiples of 2^-9;
    # moved like the others they would be subnormal in float32 too, which some GPUs take for zero.
    normal = tirx.reinterpret(floats, (magnitude << words(20, lanes)) + words(120 << 23, lanes))
    step = f32(2.0**-9) if lanes == 1 else tirx.Broadcast(f32(2.0**-9), lanes)
    small = tirx.Cast(floats, tirx.reinterpret(vector("int32", lanes), magnitude)) * step
    value = tirx.reinterpret(vector("uint32", lanes), tirx.Select(magnitude < words(8, lanes), small, normal))
    return tirx.reinterpret(floats, value | ((wide & words(0x80, lanes)) << words(24, lanes)))


def encode_e4m3(value: Expr, lanes: int) -> Expr:
    """float32 of at most 448 to e4m3, to nearest even, in the low bits of uint32."""
    floats, integers = vector("float32", lanes), vector("uint32", lanes)
    bits = bind(tirx.reinterpret(integers, value))
    magnitude = bind(bits & words(0x7FFFFFFF, lanes))
    # 2^14: the place of its last bit is 2^-9, the step of subnormal numbers, so that the addition rounds to it.
    one_step = words((127 + 14) << 23, lanes)
    small = tirx.reinterpret(integers, tirx.reinterpret(floats, magnitude) + tirx.reinterpret(floats, one_step)) - one_step
    odd = (magnitude >> words(20, lanes)) & words(1, lanes)
    normal = (magnitude - words(120 << 23, lanes) + words(0x7FFFF, lanes) + odd) >> words(20, lanes)
    code = tirx.Select(magnitude < words(121 << 23, lanes), small, normal)
    return code | ((bits >> words(24, lanes)) & words(0x80, lanes))
