"""The model's part of a search on a machine without a compiler: decides about finds with artifacts that were compiled before.

::

    run.py            python run.py: runs the artifacts in turns, writes verdicts.jsonl; needs llmc's runtime (pip install llmc)
    finds.json        the finds, and which of them each artifact has
    0/ 1/ ...         the artifacts: 0 has none of the finds; the others have no weights of their own

``llmc tune --import verdicts.jsonl`` brings the decisions back. Thin, as the runtime is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.schedules.lookup import Records
from llmc.schedules.records import call_from_json, call_to_json
from llmc.tune.compare import Site
from llmc.tune.turns import Turns, Workload
from llmc.tune.validate import Find, Validation

PHASES = ("decode", "extend")
"""The rows of finds that are not for a range of them: they touch all ranges of the phase."""

CONTENTS, VERDICTS = "finds.json", "verdicts.jsonl"


@dataclass
class Packed:
    """``model``: for people; ``kind``: of its target; ``sequences``: that it decodes together at most; ``artifacts``: of each, the
    numbers of the finds it has."""

    model: str
    kind: str
    sequences: int
    versions: str
    finds: list[Find]
    artifacts: list[list[int]]

    def write(self, folder: Path) -> None:
        finds = [{**asdict(f), "call": call_to_json(f.call)} for f in self.finds]
        (folder / CONTENTS).write_text(json.dumps({**self.__dict__, "finds": finds}, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Packed:
    """What :meth:`Packed.write` wrote."""
    value: dict[str, Any] = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
    finds = []
    for f in value.pop("finds"):
        saves = tuple((Workload(**workload), seconds) for workload, seconds in f["saves"])
        finds.append(Find(**{**f, "call": call_from_json(f["call"]), "saves": saves}))
    return Packed(**value, finds=finds)


def run(folder: Path, device: str, say: Callable[[str], None]) -> Path:
    """Decide about the finds in ``folder``, one range of rows after the other, since only for one at a time every set of finds has
    an artifact. The file of the verdicts, which grows with each."""
    packed, out, runner = read(folder), folder / VERDICTS, Turns()
    try:
        for rows in dict.fromkeys(f.rows for f in packed.finds):
            site = Site(packed.model, runner, Records(), out, folder / f"rows {rows}", device, packed.versions, say)
            build = _Prepared(folder, packed, rows)
            Validation(site, build, packed.sequences).run([f for f in packed.finds if f.rows == rows])
    finally:
        runner.close()
    return out


class _Prepared:
    """Finds the artifact that was compiled for a set of finds of one range of rows, and gives it the weights."""

    def __init__(self, folder: Path, packed: Packed, rows: str) -> None:
        self.folder, self.packed, self.rows = folder.resolve(), packed, rows

    def __call__(self, finds: frozenset[Find], out: Path) -> None:
        """Link the artifact to ``out``."""
        artifact = next(
            self.folder / str(i)
            for i, taken in enumerate(self.packed.artifacts)
            if self._tested([self.packed.finds[j] for j in taken]) == finds
        )
        (artifact / "weights").mkdir(exist_ok=True)
        for weights in (self.folder / "0" / "weights").iterdir():
            link = artifact / "weights" / weights.name
            if not link.exists():
                os.link(weights, link)
        out.parent.mkdir(exist_ok=True)
        out.unlink(missing_ok=True)
        out.symlink_to(artifact)

    def _tested(self, taken: list[Find]) -> set[Find] | None:
        """Those of the range of rows; None where others touch them."""
        touched = any((f.rows in PHASES) != (self.rows in PHASES) for f in taken)
        return None if touched else {f for f in taken if f.rows == self.rows}


def main() -> int:
    from llmc.tune.devices import device_name

    folder = Path(sys.argv[0]).resolve().parent
    out = run(folder, device_name(read(folder).kind), lambda line: print(line, flush=True))
    print(f"verdicts in {out}: `llmc tune --import` brings them back")
    return 0
