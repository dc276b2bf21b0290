"""Numbers for people: sizes, times and counts as text, and the sizes and counts that people type, as numbers.

Sizes are decimal (1 GB = 10^9 bytes) as on a disk's label; ``GiB`` and its kin are powers of 1024. A bare ``K`` after a
count is 1024, the way context lengths are written (32K = 32768).
"""

from __future__ import annotations

import re

from llmc.errors import UsageError

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_BYTES = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_COUNTS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def format_bytes(count: float) -> str:
    """A size in bytes with two significant digits or more: ``4.9 GB``, ``512 B``."""
    value = float(count)
    unit = 0
    # 999.95 would print as "1000.0" of its own unit
    while unit < len(_DECIMAL) - 1 and abs(value) >= (1000 if unit == 0 else 999.95):
        value /= 1000
        unit += 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_DECIMAL[unit]}"


def format_seconds(seconds: float) -> str:
    """A duration: ``850 µs``, ``12 ms``, ``12.3 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_count(count: int) -> str:
    """A context length or page count: a multiple of 1024 as ``32K``, anything else in full."""
    if count >= 1 << 20 and count % (1 << 20) == 0:
        return f"{count >> 20}M"
    if count >= 1 << 10 and count % (1 << 10) == 0:
        return f"{count >> 10}K"
    return str(count)


def format_parameters(count: int) -> str:
    """A parameter count the way model names write it: ``135M``, ``8.0B``, ``940``."""
    for size, suffix, digits in ((999.5e6, "B", 1), (999.5e3, "M", 0), (1e3, "K", 0)):
        if count >= size:
            scale = {"B": 1e9, "M": 1e6, "K": 1e3}[suffix]
            return f"{count / scale:.{digits}f}{suffix}"
    return str(count)


def _parse(text: str, units: dict[str, int], what: str, example: str) -> int:
    match = _NUMBER.fullmatch(text)
    scale = units.get(match.group(2).lower()) if match else None
    if match is None or scale is None:
        raise UsageError(f"{text!r} is not a {what}: write a number and a unit, for example {example}")
    # in two parts, so that 64-bit sizes stay exact
    whole, _, fraction = match.group(1).partition(".")
    return int(whole) * scale + round(float(f"0.{fraction or 0}") * scale)


def parse_bytes(text: str) -> int:
    """Bytes from ``8GB``, ``1.5 GiB``, ``512``. Raises UsageError for anything else."""
    return _parse(text, _BYTES, "size", "8GB or 512MiB")


def parse_count(text: str) -> int:
    """A count from ``32K`` (32768), ``1M``, ``4096``. Raises UsageError for anything else."""
    return _parse(text, _COUNTS, "count", "32K or 4096")
