"""The thin runtime's own source files: what ``llmc.runtime`` imports of llmc, found by following its imports."""

from __future__ import annotations

import ast
import shutil
from importlib.util import find_spec
from pathlib import Path

_ROOTS = ("llmc", "llmc.runtime")
_LEFT_OUT = ("llmc.add_variant", "llmc.compiler", "llmc.deploy")
"""Names that the roots import on demand, which a machine that only runs models never asks for."""


def thin_sources(folder: Path) -> list[str]:
    """Copy them into ``folder/llmc``; the names of the modules."""
    found = _closure()
    for name, source in found.items():
        target = folder / Path(*name.split("."))
        target = target / "__init__.py" if source.name == "__init__.py" else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return list(found)


def _closure() -> dict[str, Path]:
    """Modules by name with their files: the roots, all that is in ``llmc.runtime``, and what they import, in turn."""
    runtime = _file("llmc.runtime")
    assert runtime is not None
    files = (path.relative_to(runtime.parent).with_suffix("") for path in sorted(runtime.parent.rglob("*.py")))
    pending = [*_ROOTS, *(".".join(["llmc.runtime", *(part for part in file.parts if part != "__init__")]) for file in files)]
    found: dict[str, Path] = {}
    while pending:
        name = pending.pop()
        # Asking for what is in a module would import the module: the compiler's takes seconds.
        if name in found or any(f"{name}.".startswith(f"{module}.") for module in _LEFT_OUT):
            continue
        source = _file(name)
        if source is None:
            continue
        found[name] = source
        pending += _imports(source)
    return dict(sorted(found.items()))


def _file(name: str) -> Path | None:
    """The module's file; None for a name that is no module but something in one."""
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _imports(source: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name == "llmc" or name.startswith("llmc.")]
