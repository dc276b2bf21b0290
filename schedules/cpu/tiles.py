"""Tile registers of AMX (Intel's architecture manual, volume 1, chapter 18): eight per thread, each of up to 16 rows of 64 bytes.

A thread gives them shapes before it uses them, and gives them back when it is done: then the operating system has nothing to save
for it when it rests. Instructions name registers by number.

=================== ====================================================================================================
``tdpbssd``         c[m, n] += a[m, 4 k + j] · b[k, 4 n + j], signed bytes, exact in int32
``tdpbsud``         the same with unsigned b
``tdpbf16ps``       c[m, n] += a[m, 2 k + j] · b[k, 2 n + j], bfloat16, subnormal ones taken for 0. The sum over j = 0 and
                    that over j = 1 go through all k in float32, rounded at every step; then both are added, then c
=================== ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm
from tvm import tirx
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.emit import i64
from llmc.schedules.cpu.team import at
from llmc.targets.base import Target

Expr = Any
ROWS = 16
"""Rows of a tile at most."""
ROW_BYTES = 64
"""Bytes of a tile's row at most."""
INT8, BF16 = "amx_int8", "amx_bf16"
"""The features, as /proc/cpuinfo calls them."""


def has(target: Target, feature: str) -> bool:
    """Whether kernels for ``target`` use tiles with ``feature``: llmc asks Linux alone for permission
    (:mod:`llmc.runtime.tile_registers`)."""
    return feature in target.features and "linux" in target.triple


@contextmanager
def configured(shapes: Sequence[tuple[int, int]], *memory: tuple[int, str]) -> Iterator[list[Expr]]:
    """Give registers 0, 1, ... these (rows, bytes of a row) for what is emitted inside, and give them back behind it.

    Yields buffers of the thread's own, for each of ``memory`` one of so many elements and this dtype. They begin with a cache line,
    as the stack does not: a tile's row that lies in two takes two accesses.
    """
    sizes = [64, *(-(-count * tvm.DataType(dtype).bits // (8 * ROW_BYTES)) * ROW_BYTES for count, dtype in memory)]
    stack = T.alloc_buffer((sum(sizes) + ROW_BYTES,), "uint8")
    start = tirx.call_llvm_pure_intrin("handle", "llvm.ptrmask", tirx.address_of(stack[ROW_BYTES - 1]), i64(-ROW_BYTES))
    line = T.bind(start)
    config, *buffers = (
        T.decl_buffer((count,), dtype, data=T.bind(at(line, sum(sizes[:i]))))
        for i, (count, dtype) in enumerate([(8, "int64"), *memory])
    )
    for i, word in enumerate(_configuration(shapes)):
        T.buffer_store(config, tirx.const(word, "int64"), [i])
    _call("ldtilecfg", tirx.address_of(config[0]))
    yield buffers
    _call("tilerelease")
    # TVM gives memory that nobody speaks of any more to other buffers, and knows nothing of those that were made of it.
    T.buffer_store(stack, tirx.const(0, "uint8"), [0])


def _configuration(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """What ``ldtilecfg`` reads, as eight 64-bit words."""
    config = bytearray(64)
    config[0] = 1  # the palette of eight tiles of a kilobyte
    for register, (rows, row_bytes) in enumerate(shapes):
        config[16 + 2 * register : 18 + 2 * register] = row_bytes.to_bytes(2, "little")
        config[48 + register] = rows
    return [int.from_bytes(config[i : i + 8], "little") for i in range(0, 64, 8)]


def zero(register: int) -> None:
    _call("tilezero", _number(register))


def load(register: int, buffer: Expr, *index: Expr, stride: int) -> None:
    """Read a tile whose rows are ``stride`` bytes apart, the first at ``index``."""
    _call("tileloadd64", _number(register), tirx.address_of(buffer[index]), i64(stride))


def store(register: int, buffer: Expr, *index: Expr, stride: int) -> None:
    """Write a tile, as :func:`load` reads it."""
    _call("tilestored64", _number(register), tirx.address_of(buffer[index]), i64(stride))


def multiply(instruction: str, c: int, a: int, b: int) -> None:
    """Add the product of registers a and b to register c."""
    _call(instruction, _number(c), _number(a), _number(b))


def _number(register: int) -> Expr:
    return tirx.const(register, "int8")


def _call(name: str, *args: Expr) -> None:
    T.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *args))
