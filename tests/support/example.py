"""The C example of a package, built as its first lines say."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path


def build(package: Path, compiler: Sequence[str]) -> None:
    """Build ``package``/example.c in its folder by the command in it, with ``compiler`` and its flags for ``cc``."""
    lines = (package / "example.c").read_text(encoding="utf-8").splitlines()
    command = next(line for line in lines if line.startswith(" *   cc ")).partition("cc ")[2].partition("   (")[0]
    subprocess.run([*compiler, *shlex.split(command)], cwd=package, check=True)
