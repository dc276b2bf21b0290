"""Which configuration a call gets from records: one that a model gained by, of this very call or of those nearest to it.

A kernel that is faster alone may make a model slower: it starts while the one before it ends, shares caches with its neighbours and
may keep them waiting. So times alone decide what is tried in a model, and verdicts (:class:`~llmc.schedules.records.Verdict`) what
compiles use. A call that was measured and has no verdict in favour of anything keeps its default.

Thin, as :mod:`llmc.schedules.records` is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.schedules.parts import Space, has_parts, kept_under, spaces
from llmc.schedules.protocol import KernelCall
from llmc.schedules.records import Record, Verdict, axes, config_text, machine_class, parse_line, restore, source_hash

SHIPPED = Path(__file__).parent / "records"


@dataclass(frozen=True)
class Tuned:
    """A configuration that records gave to a call. ``origin``: ``"record"`` of this very call, or ``"nearest"``; ``why``: which."""

    config: dict[str, Any]
    origin: str
    why: str


@dataclass
class Records:
    """All usable records and verdicts of some files, the latest of each key, in the order they were made. ``notes``: what was
    skipped, one sentence each."""

    entries: dict[tuple[Any, ...], Record] = field(default_factory=dict)
    verdicts: dict[tuple[Any, ...], Verdict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _by_family: dict[str, list[Record | Verdict]] = field(default_factory=lambda: defaultdict(list), repr=False)
    _stale: set[str] = field(default_factory=set, repr=False)

    def add(self, line: Record | Verdict) -> None:
        table: dict[tuple[Any, ...], Any] = self.entries if isinstance(line, Record) else self.verdicts
        table.pop(line.key, None)
        table[line.key] = line
        self._by_family.clear()

    def supposing(self, verdicts: Iterable[Verdict]) -> Records:
        """These records if the verdicts were given."""
        supposed = Records(self.entries, dict(self.verdicts))
        for verdict in verdicts:
            supposed.add(verdict)
        return supposed

    def read(self, path: Path) -> None:
        """Add what a file holds; a line that is neither record nor verdict is skipped and named in ``notes``."""
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

    def _current(self, family: Any, machine: str) -> list[Record | Verdict]:
        if not self._by_family:
            lines: list[Record | Verdict] = [*self.entries.values(), *self.verdicts.values()]
            for line in lines:
                self._by_family[line.family].append(line)
        found = self._by_family.get(family.NAME, [])
        current = [r for r in found if r.source == source_hash(family, r.config)]
        stale = len(found) - len(current)
        if stale and family.NAME not in self._stale:
            self._stale.add(family.NAME)
            self.notes.append(
                f"{stale} tuning records of {family.NAME} are ignored: the kernel's source has changed since; tune again"
            )
        return [r for r in current if r.machine == machine]

    def of_family(self, family: Any, machine: str) -> list[Record]:
        """The records of the family on this class of machine, made from the source as it is now; others are named in ``notes``."""
        return [r for r in self._current(family, machine) if isinstance(r, Record)]

    def judged(self, family: Any, call: KernelCall, target: Any, space: Space) -> list[Verdict]:
        """The verdicts on configurations of one space of a call, those for this very target if there are any."""
        of_machine = self._current(family, machine_class(target))
        found = [v for v in of_machine if isinstance(v, Verdict) and v.call == call and axes(v.config) == space.keys()]
        return [v for v in found if v.target == target.name] or found

    def lookup(self, family: Any, call: KernelCall, target: Any) -> Tuned | None:
        """The configuration for ``call``: what a model gained by, its default if that was nothing; for a call that was never
        measured, what does best on the nearest calls; else None.

        Of a family with parts, each part has its own; ``origin`` is ``"record"`` if all that were found are of this very call, and
        what no record speaks of keeps its default.
        """
        family, call = kept_under(family, call)
        known = self.of_family(family, machine_class(target))
        found = {tuple(space): self._best(known, family, call, target, space) for space in spaces(family, call, target)}
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

    def _best(self, known: Sequence[Record], family: Any, call: KernelCall, target: Any, space: Space) -> Tuned | None:
        """The configuration of one space."""
        if all(len(values) < 2 for values in space.values()):
            return None
        for verdict in reversed(self.judged(family, call, target, space)):
            config = restore(verdict.config, space) if verdict.kept else None
            if config is not None:
                return Tuned(config, "record", f"{verdict.model} gained by it on {verdict.device} ({verdict.gain:.3f}x)")
        known = [r for r in known if axes(r.config) == space.keys()]
        if exact := [r for r in known if r.call == call]:
            default = {axis: values[0] for axis, values in space.items()}
            return Tuned(default, "record", f"the default: measured on {exact[-1].device}, and no model gained by anything else")
        return self._nearest(known, family, call, target, space)

    def _nearest(self, known: Sequence[Record], family: Any, call: KernelCall, target: Any, space: Space) -> Tuned | None:
        """Kernel regression over calls: each neighbour votes with the slowdowns of what models gained by and of the default,
        weighted by how near it is. None if models gained by nothing."""
        by_call: dict[KernelCall, list[Record]] = defaultdict(list)
        for r in known:
            by_call[r.call].append(r)
        near = sorted(((distance(call, other), i, other) for i, other in enumerate(by_call)), key=lambda n: n[:2])
        near = [n for n in near if n[0] < 2 * REACH][:NEIGHBOURS]
        kept = {v.config for _, _, other in near for v in self.judged(family, other, target, space) if v.kept}
        configs = {text: config for text in sorted(kept) if (config := restore(text, space)) is not None}
        if not configs:
            return None
        default = default_text(space)
        configs[default] = {axis: values[0] for axis, values in space.items()}
        tables = [(math.exp(-((d / REACH) ** 2) / 2), slowdowns(by_call[other])) for d, _, other in near]
        weight = sum(w for w, _ in tables)
        scores = {text: sum(w * table.get(text, UNKNOWN) for w, table in tables) / weight for text in configs}
        best = worthwhile(scores, default)
        shapes = " and ".join(str(list(other.args[1].shape)) for _, _, other in near[:1])
        return Tuned(configs[best], "nearest", f"from records of the nearest call, {near[0][2].op} with {shapes}")


WORTH = math.log(1.02)
"""What the default must lose by before another configuration counts as faster: two measurements of one differ by a percent."""


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
    if _kind(a) != _kind(b):
        return math.inf
    operands = 5 if a.op == "llmc.moe" else 2  # a bias or a residual more or less changes little
    pairs = list(zip(a.args[:operands], b.args[:operands], strict=True))
    if any(x.dtype != y.dtype or len(x.shape) != len(y.shape) for x, y in pairs):
        return math.inf
    total = 0.0
    for m, n in {sizes for x, y in pairs for sizes in zip(x.shape, y.shape, strict=True)}:
        if isinstance(m, int) and isinstance(n, int):
            total += math.log2(max(m, 1) / max(n, 1)) ** 2
        elif m != n:
            return math.inf
    for m, n in ((a.attr(name), b.attr(name)) for name in ("experts", "inner")):
        if m and n:
            total += math.log2(int(m) / int(n)) ** 2
    return math.sqrt(total)


def _kind(call: KernelCall) -> tuple[Any, ...]:
    """What calls must have in common to be near."""
    stored = (call.attr(name) for name in ("scheme", "gate_up_scheme", "down_scheme"))
    return (call.op, call.phase, *stored, call.attr("gated"), _is_gated(call))


def _is_gated(call: KernelCall) -> bool:
    return str(call.attr("activation", "")).endswith("_gated")


def load(folders: Sequence[Path]) -> Records:
    """The records of every ``*.jsonl`` file in ``folders``; of equal keys the later folder's counts. A missing folder is empty."""
    records = Records()
    for folder in folders:
        for path in sorted(folder.glob("*.jsonl")):
            records.read(path)
    return records
