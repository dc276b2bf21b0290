"""The CPU's part of docs/targets.md: each kernel with each instruction set, and its worst error."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path

from llmc import targets
from llmc.schedules.cpu import FAMILIES
from llmc.targets.cpu import ARM
from tests.kernels.cpu_cases import worst
from tests.support import amx

COLUMNS = {
    "SSE2": "cpu:x86-64",
    "AVX2": "cpu:x86-64-v3",
    "AVX-VNNI": "cpu:x86-64-v3+avxvnni",
    "AVX-512 VNNI": "cpu:x86-64-v4+avx512vnni",
    "AMX": "cpu:x86-64-v3+amx-bf16+amx-int8",
    "NEON": "cpu:aarch64+neon",
    "NEON dotprod": "cpu:aarch64+dotprod",
    "NEON i8mm": "cpu:aarch64+dotprod+i8mm",
}
ROWS = (1, 7)
"""Rows that kernels are run with."""

HEAD = """
# Kernels of CPU targets

Targets: {targets}, and every processor that LLVM knows.

The instruction sets below are those that kernels differ by. x86-64 ran on its hardware; 64-bit Arm under qemu's user mode, where
SmolLM2 gives the same tokens too (`pytest -m slow tests/slow`). AMX's tile instructions were emulated one by one
(`tests/support/amx_emulator.c`), with AVX2 beside them; on a processor that has them, beside AVX-512 as `cpu:sapphirerapids` and
its kin do, products of quantized weights had the bits that they have without (benchmarks/cpu.md). Libraries for macOS, Windows and
Android are linked and their headers checked; none has run there.

Largest error of any shape against a float64 reference, in units of the result's largest value, for float32 / 16-bit results.
Products with quantized weights are given activations that 8 bits hold, so that what they round is not in it; between the two
products of quantized experts they do round, and that is nearly all of the error there.
"""

Errors = dict[tuple[str, str, str], float]


def lacking(spec: str) -> str:
    """The features that this machine lacks to run ``spec``, or the architecture, if it is not 64-bit Arm, which is emulated."""
    target = targets.parse(spec)
    return "" if target.triple == ARM else amx.lacking(target)


def measured(spec: str) -> Errors:
    with tempfile.TemporaryDirectory(prefix="llmc-table-") as folder:
        return worst(spec, ROWS, Path(folder))


def _cell(name: str, found: Errors | None) -> str:
    if found is None:
        return "not run"
    values: Mapping[bool, list[float]] = {
        wide: [e for (family, _, dtype), e in found.items() if family == name and (dtype in ("float32", "int32")) == wide]
        for wide in (True, False)
    }
    return " / ".join(f"{max(values[wide]):.1e}" for wide in (True, False) if values[wide]) or "no kernel"


def section(pool: Executor) -> str:
    """The text, its errors measured by the workers of ``pool``."""
    missing = {spec: lacking(spec) for spec in COLUMNS.values()}
    pending = {spec: pool.submit(measured, spec) for spec in COLUMNS.values() if not missing[spec]}
    found = {spec: future.result() for spec, future in pending.items()}
    lines = [HEAD.format(targets=", ".join(f"`{spec}`" for spec in targets.known_specs() if spec.startswith("cpu")))]
    lines += [f"| kernel | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for family in FAMILIES:
        cells = [_cell(family.NAME, found.get(spec)) for spec in COLUMNS.values()]
        lines.append(f"| `{family.NAME}` | {' | '.join(cells)} |")
    lines += [f"\n`{spec}` was not run: the machine that made this table lacks {what}." for spec, what in missing.items() if what]
    return "\n".join(lines)
