"""The package installs from a bare checkout, both ways, with every module under the name it is imported by."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = ("llmc.cli.main", "llmc.runtime.host", "llmc.passes", "llmc.schedules.protocol", "llmc.targets.base", "llmc.errors")
HEAVY = {"apache-tvm", "torch", "transformers", "gguf", "safetensors", "huggingface-hub"}


def requirements(extra: str | None = None) -> set[str]:
    """Names of what ``pip install llmc`` (or ``llmc[extra]``) requires."""
    names = set()
    for line in distribution("llmc").requires or []:
        requirement, _, marker = line.partition(";")
        of = re.search(r"""extra == ["'](\w+)["']""", marker)
        if (of.group(1) if of else None) == extra:
            names.add(re.split(r"[<>=!~ \[]", requirement)[0].lower())
    return names


def test_base_install_is_thin() -> None:
    assert requirements() == {"apache-tvm-ffi", "numpy", "tokenizers", "jinja2", "rich", "filelock"}
    assert HEAVY <= requirements("compile") <= requirements("dev")


def test_constraints_pin_everything_that_is_required() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    pinned = {line.split("==")[0].lower().replace("_", "-"): line.split("==")[1] for line in lines}
    for extra in (None, "compile", "dev"):
        assert {name.replace("_", "-") for name in requirements(extra)} <= pinned.keys()
    # A local version (2.13.0+cpu) exists on one index only.
    assert not [version for version in pinned.values() if "+" in version]


def test_no_line_of_the_project_names_this_machine_or_an_index() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    words = re.compile("/wo" + "rk/|/opt" + "/pypi|pypi" + r"\.org|index" + "-url")
    found = []
    for name in tracked:
        path = ROOT / name
        if path.is_file() and path.suffix in ("", ".py", ".toml", ".md", ".txt", ".cfg"):
            found += [f"{name}: {line}" for line in path.read_text(encoding="utf-8").splitlines() if words.search(line)]
    assert not found


@pytest.mark.parametrize("how", [["."], ["-e", "."]], ids=["plain", "editable"])
def test_install_into_a_fresh_environment(how: list[str], tmp_path: Path) -> None:
    """Without dependencies, which are the same either way: what is tested is the mapping of folders to package names."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    source = ROOT if "-e" in how else _copy(tmp_path / "checkout")
    subprocess.run(
        [sys.executable, "-m", "pip", f"--python={python}", "install", "-q", "--no-deps", *how], cwd=source, check=True, timeout=240
    )
    code = f"from importlib.util import find_spec; print([find_spec(name).origin for name in {MODULES!r}])"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (str(ROOT) in done.stdout) == ("-e" in how)
    version = subprocess.run([environment / "bin" / "llmc", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert version.stdout.startswith("llmc ")


def _copy(folder: Path) -> Path:
    """The tracked files, without what a build in the checkout would leave behind."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder
