"""What measuring found out about kernels, and the files that hold it: a line of JSON each in a ``*.jsonl`` file.

A record is a kernel call with sizes for its symbols, on a target and a device, with a configuration, and the time it took alone or
the reason it failed. A verdict says of such a configuration whether a whole model gained by it: only then do compiles use it
(:mod:`llmc.schedules.lookup`). Files only grow. Every line carries a hash of itself, so that a line cut short by a full disk or a
crash is skipped and named, and never mistaken for another; it also carries the hash of the source of its kernel family, and is
ignored (and named) once that has changed.

Thin: no compiler import, so that a machine without one can write records.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmc.errors import OutputError
from llmc.schedules.parts import has_parts, kernel_of
from llmc.schedules.protocol import KernelCall, TensorSpec

Symbols = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Record:
    """One measurement. ``seconds``: the median of the time of one call (None if the candidate failed, and ``error`` says how);
    ``spread``: distance between the quartiles over the median; ``machine``: what kernels are alike on (:func:`machine_class`);
    ``source``: :func:`source_hash` of what the configuration builds; ``versions``: of llmc and TVM."""

    family: str
    call: KernelCall
    symbols: Symbols
    target: str
    machine: str
    device: str
    config: str
    seconds: float | None
    spread: float
    error: str
    source: str
    versions: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured. Of two records with one key the later is true."""
        return self.family, self.call, self.symbols, self.target, self.device, self.config, self.source

    def line(self) -> str:
        """The record as a line of a file, hash included, without the newline."""
        return _line({**self.__dict__, "symbols": dict(self.symbols)})


@dataclass(frozen=True)
class Verdict:
    """Whether a model is faster with ``config`` than with what compiles took before (``kept``). ``model``: which; ``gain``: of its
    steps that run the kernel, and with all that was changed together, how many times as fast. Other fields as of a
    :class:`Record`."""

    family: str
    call: KernelCall
    target: str
    machine: str
    device: str
    config: str
    kept: bool
    gain: float
    model: str
    source: str
    versions: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What was judged. Of two verdicts with one key the later is true."""
        return "verdict", self.family, self.call, self.target, self.device, self.config, self.source

    def line(self) -> str:
        """The verdict as a line of a file, hash included, without the newline."""
        return _line(dict(self.__dict__))


def _line(fields: dict[str, Any]) -> str:
    value = {**fields, "call": call_to_json(fields["call"]), "config": json.loads(fields["config"])}
    return json.dumps({"sha": _digest(value), **value}, separators=(",", ":"))


def call_to_json(call: KernelCall) -> dict[str, Any]:
    """A KernelCall as JSON holds it."""
    return {
        "op": call.op,
        "args": [[list(a.shape), a.dtype] for a in call.args],
        "result": [list(call.result.shape), call.result.dtype],
        "attrs": dict(call.attrs),
        "phase": call.phase,
    }


def call_from_json(value: dict[str, Any]) -> KernelCall:
    """The inverse of :func:`call_to_json`. Raises KeyError, TypeError or ValueError for anything else."""
    args = tuple(TensorSpec(tuple(shape), dtype) for shape, dtype in value["args"])
    shape, dtype = value["result"]
    attrs = tuple(sorted((name, tuple(v) if isinstance(v, list) else v) for name, v in value["attrs"].items()))
    return KernelCall(value["op"], args, TensorSpec(tuple(shape), dtype), attrs, value["phase"])


def config_text(config: dict[str, Any]) -> str:
    """A configuration as text that is equal for equal configurations."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


@cache
def axes(config: str) -> frozenset[str]:
    """The axes of a configuration that :func:`config_text` wrote."""
    return frozenset(json.loads(config))


def restore(config: str, space: dict[str, list[Any]]) -> dict[str, Any] | None:
    """The configuration that :func:`config_text` wrote, with the very values of ``space``; None if they are not all in it."""
    found, wanted = {}, json.loads(config)
    if set(wanted) != set(space):
        return None
    for axis, values in space.items():
        text = json.dumps(wanted[axis], sort_keys=True)
        match = [v for v in values if json.dumps(v, sort_keys=True) == text]
        if not match:
            return None
        found[axis] = match[0]
    return found


def machine_class(target: Any) -> str:
    """Targets whose kernels are alike: the instruction set and vector width of a CPU, the architecture of a GPU."""
    if target.kind == "cpu":
        return f"cpu-{target.triple.partition('-')[0]}-{target.vector_bits}"
    return f"{target.kind}-{target.mcpu}"


def source_hash(family: Any, config: str) -> str:
    """Hash of the code of the module that a family lives in, and of those of the kernels it picks from; comments, docstrings and
    imports do not count: what a module imports is not in its hash, so where it is found must not be either.

    Of a part (:mod:`llmc.schedules.parts`) it is the code of the one kernel that ``config`` (:func:`config_text`) names: another
    kernel's change, or another space to pick from, makes no difference to what was measured. Empty for a kernel there is no more.
    """
    if has_parts(family):
        kernel = kernel_of(family, config)
        return "" if kernel is None else _code_hash(_path(kernel))
    own = _code_hash(_path(family))
    kernels = [_code_hash(_path(kernel)) for _, kernel in sorted(getattr(family, "KERNELS", {}).items())]
    return hashlib.sha256("".join([own, *kernels]).encode()).hexdigest()[:16] if kernels else own


def _path(family: Any) -> str:
    name = family.__name__ if hasattr(family, "__name__") else type(family).__module__
    path = (sys.modules.get(name) or importlib.import_module(name)).__file__
    assert path is not None
    return path


@cache
def _code_hash(path: str) -> str:
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_aside(s)]  # type: ignore[attr-defined]
    return hashlib.sha256(_dumped(tree).encode()).hexdigest()[:16]


def _is_aside(statement: ast.stmt) -> bool:
    """An import, a docstring, or the text below an assignment."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return True
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _dumped(node: Any) -> str:
    """A syntax tree as text that is the same in every version of Python: newer ones give nodes more fields, empty for old code."""
    if isinstance(node, list):
        return f"[{','.join(map(_dumped, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{name}={_dumped(value)}" for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({','.join(fields)})"


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def parse_line(line: str) -> Record | Verdict:
    """What a line holds. Raises ValueError if it is no JSON, lacks a field or does not have the hash it says."""
    try:
        value = json.loads(line)
        if _digest({k: v for k, v in value.items() if k != "sha"}) != value["sha"]:
            raise ValueError("its hash does not fit")
        value.pop("sha")
        value["call"] = call_from_json(value["call"])
        value["config"] = config_text(value["config"])
        if "kept" in value:
            return Verdict(**value)
        value["symbols"] = tuple(sorted(value["symbols"].items()))
        return Record(**value)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def append(path: Path, records: Iterable[Record | Verdict]) -> None:
    """Add lines to a file, all or none of them; several processes may do so at once. Raises OutputError if it cannot be done."""
    from filelock import FileLock

    data = "".join(r.line() + "\n" for r in records).encode()
    if not data:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")), path.open("ab") as file:
            size = file.tell()
            if size and not _ends_with_newline(path):
                data = b"\n" + data  # the writer before was cut off: its half line must not swallow the next
            try:
                _write_all(file.fileno(), data)
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        raise OutputError(
            f"tuning records cannot be written to {path} ({error.strerror}): make room there, or choose another folder with "
            "--records DIR; what was found before is kept"
        ) from error


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
