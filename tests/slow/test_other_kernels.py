"""Every CPU kernel for 64-bit Arm, run by an emulator of that processor, against its float64 reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc import targets
from tests.kernels.cpu_cases import cases_of, tolerance, worst


# Slow: an emulated processor. Needs the Debian packages that tests/support/other_processor.py names.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("spec", ["cpu:aarch64+neon", "cpu:aarch64+dotprod", "cpu:aarch64+dotprod+i8mm"])
def test_every_kernel(spec: str, tmp_path: Path) -> None:
    families = {family.NAME: family for family, _ in cases_of(targets.parse(spec))}
    found = worst(spec, (1, 7), tmp_path)
    assert {name for name, _, _ in found} == set(families)
    for (name, label, dtype), error in found.items():
        assert error <= tolerance(families[name], label, dtype), (name, label, dtype)
