"""What measuring found out about kernels: records, the files that hold them, and which configuration a call gets from them.

A record is one line of JSON in a ``*.jsonl`` file: a kernel call with sizes for its symbols, on a target and a device, with a
configuration, and the time it took or the reason it failed. Files only grow. Every line carries a hash of itself, so that a line
cut short by a full disk or a crash is skipped and named, and never mistaken for another; a record also carries the hash of the
source of its kernel family, and is ignored (and named) once that has changed.

Thin: no compiler import, so that a machine without one can write records.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llmc.errors import OutputError
from llmc.schedules.parts import Space, has_parts, kept_under, kernel_of, spaces
from llmc.schedules.protocol import KernelCall, TensorSpec

SHIPPED = Path(__file__).parent / "records"
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
        value = {**self.__dict__, "call": call_to_json(self.call), "symbols": dict(self.symbols), "config": json.loads(self.config)}
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


def parse_line(line: str) -> Record:
    """The record in a line. Raises ValueError if it is no JSON, lacks a field or does not have the hash it says."""
    try:
        value = json.loads(line)
        if _digest({k: v for k, v in value.items() if k != "sha"}) != value["sha"]:
            raise ValueError("its hash does not fit")
        value.pop("sha")
        value["call"] = call_from_json(value["call"])
        value["symbols"] = tuple(sorted(value["symbols"].items()))
        value["config"] = config_text(value["config"])
        return Record(**value)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file, all or none of them; several processes may do so at once. Raises OutputError if it cannot be done."""
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


@dataclass(frozen=True)
class Tuned:
    """A configuration that records gave to a call. ``origin``: ``"record"`` of this very call, or ``"nearest"``; ``why``: which."""

    config: dict[str, Any]
    origin: str
    why: str


@dataclass
class Records:
    """All usable records of some files, the latest of each key. ``notes``: what was skipped, one sentence each."""

    entries: dict[tuple[Any, ...], Record] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _by_family: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list), repr=False)
    _stale: set[str] = field(default_factory=set, repr=False)

    def add(self, record: Record) -> None:
        self.entries.pop(record.key, None)
        self.entries[record.key] = record
        self._by_family.clear()

    def read(self, path: Path) -> None:
        """Add the records of a file; a line that is none is skipped and named in ``notes``."""
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            self.notes.append(f"{path}: not readable ({error.strerror}), its records are left out")
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                self.add(parse_line(line.decode("utf-8")))
            except ValueError as error:
                self.notes.append(f"{path} line {number}: not a record ({error}), skipped")

    def of_family(self, family: Any, machine: str) -> list[Record]:
        """The records of the family on this class of machine, made from the source as it is now; others are named in ``notes``."""
        if not self._by_family:
            for record in self.entries.values():
                self._by_family[record.family].append(record)
        found = self._by_family.get(family.NAME, [])
        current = [r for r in found if r.source == source_hash(family, r.config)]
        stale = len(found) - len(current)
        if stale and family.NAME not in self._stale:
            self._stale.add(family.NAME)
            self.notes.append(
                f"{stale} tuning records of {family.NAME} are ignored: the kernel's source has changed since; tune again"
            )
        return [r for r in current if r.machine == machine]

    def lookup(self, family: Any, call: KernelCall, target: Any) -> Tuned | None:
        """The configuration for ``call``: the best measured for it, else the one that does best on the nearest calls, else None.

        Of a family with parts, each part has its own; ``origin`` is ``"record"`` if all that were found are of this very call, and
        what no record speaks of keeps its default.
        """
        family, call = kept_under(family, call)
        known = self.of_family(family, machine_class(target))
        if not known:
            return None
        found = {tuple(space): self._best(known, call, target, space) for space in spaces(family, call, target)}
        tuned = {axes: t for axes, t in found.items() if t is not None}
        if not tuned:
            return None
        if not has_parts(family):
            return next(iter(tuned.values()))
        config = {axis: values[0] for axis, values in family.space(call, target).items()}
        for t in tuned.values():
            config |= t.config
        origin = "record" if all(t.origin == "record" for t in tuned.values()) else "nearest"
        return Tuned(config, origin, "; ".join(f"{', '.join(axes)}: {t.origin}, {t.why}" for axes, t in tuned.items()))

    def _best(self, known: Sequence[Record], call: KernelCall, target: Any, space: Space) -> Tuned | None:
        """The configuration of one space."""
        if all(len(values) < 2 for values in space.values()):
            return None
        known = [r for r in known if axes(r.config) == space.keys()]
        exact = [r for r in known if r.call == call]
        exact = [r for r in exact if r.target == target.name] or exact
        if scores := slowdowns(exact):
            configs = {text: config for text in scores if (config := restore(text, space)) is not None}
            if configs:
                best = worthwhile({text: scores[text] for text in configs}, default_text(space))
                device = next(r.device for r in exact if r.config == best and r.seconds is not None)
                return Tuned(configs[best], "record", f"measured on {device}, {len(scores)} configurations tried")
        return _nearest(known, call, space)


WORTH = math.log(1.02)
"""What the default must lose by before another configuration is taken: kernels are measured alone, and a model runs them one behind
the other, where a percent may turn into its opposite."""


def default_text(space: Space) -> str:
    """A space's default, the first value of every axis, as :func:`config_text`."""
    return config_text({axis: values[0] for axis, values in space.items()})


def worthwhile(scores: dict[str, float], default: str) -> str:
    """The configuration with the lowest score (the logarithm of a time), or the default if that is hardly higher."""
    best = min(scores, key=lambda text: (scores[text], text))
    return default if scores.get(default, math.inf) - scores[best] < WORTH else best


def slowdowns(records: Sequence[Record]) -> dict[str, float]:
    """For every configuration the mean of log(time / best time) over the sizes and devices it was measured on.

    Only configurations that were measured wherever the most were, and failed nowhere: a time at one size says nothing of another.
    """
    groups: dict[Any, dict[str, float]] = defaultdict(dict)
    failed = {r.config for r in records if r.seconds is None}
    for r in records:
        if r.seconds is not None and r.config not in failed:
            groups[r.target, r.device, r.symbols][r.config] = math.log(r.seconds)
    logs: dict[str, list[float]] = defaultdict(list)
    for times in groups.values():
        best = min(times.values())
        for config, value in times.items():
            logs[config].append(value - best)
    most = max(map(len, logs.values()), default=0)
    return {config: sum(values) / most for config, values in logs.items() if len(values) == most}


NEIGHBOURS = 3
"""Calls whose times say something about another one."""

REACH = 1.5
"""Distance, in octaves over all dimensions together, over which what a call says loses a factor e."""

UNKNOWN = math.log(1.1)
"""Slowdown assumed of a configuration that a neighbour has not tried."""


def distance(a: KernelCall, b: KernelCall) -> float:
    """How far apart the sizes of two calls of one kind are, in octaves; infinite for calls that differ in anything else: how their
    weights are stored, or whether they are gated. A bias or another activation makes no difference.
    """
    if (a.op, a.phase, a.attr("scheme"), _is_gated(a)) != (b.op, b.phase, b.attr("scheme"), _is_gated(b)):
        return math.inf
    pairs = list(zip(a.args[:2], b.args[:2], strict=True))  # a bias or a residual more or less changes little
    if any(x.dtype != y.dtype or len(x.shape) != len(y.shape) for x, y in pairs):
        return math.inf
    total = 0.0
    for m, n in {sizes for x, y in pairs for sizes in zip(x.shape, y.shape, strict=True)}:
        if isinstance(m, int) and isinstance(n, int):
            total += math.log2(max(m, 1) / max(n, 1)) ** 2
        elif m != n:
            return math.inf
    return math.sqrt(total)


def _is_gated(call: KernelCall) -> bool:
    return str(call.attr("activation", "")).endswith("_gated")


def _nearest(known: Sequence[Record], call: KernelCall, space: dict[str, list[Any]]) -> Tuned | None:
    """Kernel regression over calls: each neighbour votes with its slowdowns, weighted by how near it is."""
    by_call: dict[KernelCall, list[Record]] = defaultdict(list)
    for r in known:
        by_call[r.call].append(r)
    near = sorted(((distance(call, other), i, other) for i, other in enumerate(by_call)), key=lambda n: n[:2])
    near = [n for n in near if n[0] < 2 * REACH][:NEIGHBOURS]
    tables = [(math.exp(-((d / REACH) ** 2) / 2), slowdowns(by_call[other])) for d, _, other in near]
    configs = {text: restored for _, table in tables for text in table if (restored := restore(text, space)) is not None}
    if not configs:
        return None
    weight = sum(w for w, _ in tables)
    scores = {text: sum(w * table.get(text, UNKNOWN) for w, table in tables) / weight for text in configs}
    best = worthwhile(scores, default_text(space))
    shapes = " and ".join(str(list(other.args[1].shape)) for _, _, other in near[:1])
    return Tuned(configs[best], "nearest", f"from records of the nearest call, {near[0][2].op} with {shapes}")


def load(folders: Sequence[Path]) -> Records:
    """The records of every ``*.jsonl`` file in ``folders``; of equal keys the later folder's counts. A missing folder is empty."""
    records = Records()
    for folder in folders:
        for path in sorted(folder.glob("*.jsonl")):
            records.read(path)
    return records
