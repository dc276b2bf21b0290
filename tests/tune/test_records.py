"""Record files: what is written is read back, whatever happens to a file; and which configuration a call gets from them."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from llmc import targets
from llmc.errors import OutputError
from llmc.schedules import lookup as L
from llmc.schedules import records as R
from llmc.schedules.cpu import linear
from llmc.schedules.gpu import quantized_call
from llmc.schedules.protocol import KernelCall
from tests.support.tuning import verdict

HOST = targets.parse("cpu")
CALL = linear._call(48, 64)


def make(seconds: float | None, config: dict[str, Any], call: KernelCall = CALL, n: int = 512, **changes: Any) -> R.Record:
    record = R.Record(
        "cpu.linear", call, (("n", n),), HOST.name, R.machine_class(HOST), "a machine", R.config_text(config), seconds, 0.01,
        "" if seconds else "crashed", R.source_hash(linear, R.config_text(config)), "llmc test",
    )  # fmt: skip
    return dataclasses.replace(record, **changes)


def judged(records: L.Records, *found: R.Record, kept: bool = True) -> None:
    """A model gained by what was measured, or lost."""
    for record in found:
        records.add(record)
        records.add(verdict(record, kept))


def configs(call: KernelCall = CALL) -> list[dict[str, Any]]:
    space = linear.space(call, HOST)
    return [{**{axis: values[0] for axis, values in space.items()}, "row_block": block} for block in space["row_block"]]


def read(path: Path) -> L.Records:
    records = L.Records()
    records.read(path)
    return records


def test_round_trip(tmp_path: Path) -> None:
    call = dataclasses.replace(CALL, attrs=(("a", (1, 2)), ("b", 0.25), ("c", "x")))
    written = [make(1e-5, configs()[0]), make(None, configs()[1], call)]
    R.append(tmp_path / "r.jsonl", written)
    found = read(tmp_path / "r.jsonl")
    assert list(found.entries.values()) == written
    assert found.notes == []


def test_corrupt_lines_are_skipped_and_named_and_nothing_else_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    written = [make(float(i + 1), configs()[0], n=i) for i in range(4)]
    R.append(path, written)
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b'"seconds":2.0', b'"seconds":0.2')  # still JSON: only its hash tells
    lines[2] = lines[2][:40]
    path.write_bytes(b"\n".join(lines))
    found = read(path)
    assert list(found.entries.values()) == [written[0], written[3]]
    assert [n.partition(":")[0] for n in found.notes] == [f"{path} line 2", f"{path} line 3"]


def test_a_half_written_last_line_does_not_swallow_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    R.append(path, [make(1.0, configs()[0]), make(2.0, configs()[1])])
    path.write_bytes(path.read_bytes()[:-30])  # the machine went down in the middle of a write
    R.append(path, [make(3.0, configs()[2])])
    found = read(path)
    assert sorted(r.seconds or 0 for r in found.entries.values()) == [1.0, 3.0]
    assert len(found.notes) == 1


def test_full_disk(tmp_path: Path) -> None:
    """The file may not grow (a limit of the operating system): an error that says so, and the file as it was."""
    path = tmp_path / "r.jsonl"
    R.append(path, [make(1.0, configs()[0])])
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot be written .* --records DIR"):
            R.append(path, [make(2.0, configs()[1])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


WRITER = """
import sys
from pathlib import Path
from llmc.schedules.records import append, parse_line
import dataclasses
path, who = Path(sys.argv[1]), int(sys.argv[2])
record = parse_line(sys.argv[3])
for i in range(60):
    append(path, [dataclasses.replace(record, symbols=(("n", who * 1000 + i),)) for _ in range(1)])
"""


def test_two_tuners_on_one_file(tmp_path: Path) -> None:
    path, line = tmp_path / "r.jsonl", make(1.0, configs()[0]).line()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(who), line]) for who in (1, 2)]
    assert [w.wait() for w in writers] == [0, 0]
    found = read(path)
    assert found.notes == []
    assert sorted(dict(r.symbols)["n"] for r in found.entries.values()) == [*range(1000, 1060), *range(2000, 2060)]


def test_verdicts_are_kept_beside_records(tmp_path: Path) -> None:
    record = make(1e-5, configs()[1])
    written = [verdict(record), verdict(make(1e-5, configs()[2]), kept=False)]
    R.append(tmp_path / "r.jsonl", [record, *written])
    found = read(tmp_path / "r.jsonl")
    assert list(found.verdicts.values()) == written
    assert list(found.entries.values()) == [record]
    cut = (tmp_path / "r.jsonl").read_bytes().replace(b'"kept":false', b'"kept":true')
    (tmp_path / "r.jsonl").write_bytes(cut)
    assert list(read(tmp_path / "r.jsonl").verdicts.values()) == written[:1]


def test_faster_alone_is_not_enough() -> None:
    """A call keeps its default until a model gained by something else."""
    default, faster, *_ = configs()
    records = L.Records()
    records.add(make(2.0, default))
    records.add(make(1.0, faster))
    found = records.lookup(linear, CALL, HOST)
    assert found is not None
    assert (found.origin, found.config) == ("record", default)
    assert "no model gained" in found.why
    judged(records, make(1.0, faster))
    found = records.lookup(linear, CALL, HOST)
    assert found is not None
    assert (found.origin, found.config) == ("record", faster)
    assert "a model gained by it on a machine (1.050x)" in found.why


def test_the_latest_verdict_counts() -> None:
    _, first, second, third = configs()
    records = L.Records()
    judged(records, make(3.0, first), make(1.0, second))
    judged(records, make(0.5, third), kept=False)
    for wanted, then in ((second, second), (first, first)):
        found = records.lookup(linear, CALL, HOST)
        assert found is not None
        assert found.config == wanted
        judged(records, make(1.0, then), kept=False)
    found = records.lookup(linear, CALL, HOST)
    assert found is not None
    assert found.config == configs()[0]


def test_slowdowns_weigh_all_sizes_and_leave_out_what_failed_or_was_not_timed_at_all_of_them() -> None:
    first, second, third, fourth = (R.config_text(c) for c in configs())
    times = {first: (2.0, 2.0), second: (1.0, 8.0), third: (1.9, 1.9)}
    records = [make(seconds, json.loads(c), n=n) for c, pair in times.items() for n, seconds in zip((1, 512), pair, strict=True)]
    records.append(make(0.1, json.loads(fourth), n=1))
    found = L.slowdowns(records)
    assert sorted(found, key=found.__getitem__) == [third, first, second]
    assert third not in L.slowdowns([*records, make(None, json.loads(third), n=1)])


def test_lookup_without_a_record_asks_the_nearest_calls() -> None:
    records = L.Records()
    near, far = linear._call(64, 64), linear._call(512, 2048)
    for i, config in enumerate(configs()):
        judged(records, make(1.0 + abs(i - 2), config, near), make(1.0 + abs(i - 1), config, far))
    found = records.lookup(linear, CALL, HOST)
    assert found is not None
    assert (found.origin, found.config) == ("nearest", configs()[2])
    assert "[64, 64]" in found.why
    other_dtype = linear._call(48, 64, "bfloat16")
    assert records.lookup(linear, other_dtype, HOST) is None
    assert records.lookup(linear, dataclasses.replace(CALL, phase="decode"), HOST) is None


def test_neighbours_speak_for_what_models_gained_by_alone() -> None:
    records = L.Records()
    near = linear._call(64, 64)
    for i, config in enumerate(configs()):
        records.add(make(1.0 + abs(i - 2), config, near))
    assert records.lookup(linear, CALL, HOST) is None
    judged(records, make(2.0, configs()[1], near))
    found = records.lookup(linear, CALL, HOST)
    assert found is not None
    assert found.config == configs()[1]


def test_a_neighbour_must_be_faster_by_more_than_measurements_differ() -> None:
    for gain, at in ((1.01, 0), (1.05, 2)):
        records = L.Records()
        for i, config in enumerate(configs()):
            judged(records, make({0: 1.0, 2: 1.0 / gain}.get(i, 1.5), config))
        near = records.lookup(linear, linear._call(48, 72), HOST)
        assert near is not None
        assert (near.origin, near.config) == ("nearest", configs()[at])


def test_calls_that_store_weights_in_another_way_or_gate_are_never_near() -> None:
    a, b = quantized_call.make(4096, 4096, "int4_g128"), quantized_call.make(4096, 2048, "int4_g128")
    assert L.distance(a, b) == pytest.approx(1.0, abs=0.5)
    assert L.distance(a, quantized_call.make(4096, 2048, "int8")) == math.inf
    assert L.distance(a, quantized_call.make(4096, 4096, "int4_g128", activation="silu_gated")) == math.inf
    assert L.distance(a, quantized_call.make(4096, 4096, "int4_g128", activation="silu", residual=1)) == 0.0


def test_records_of_other_sources_and_machines_are_not_used() -> None:
    records = L.Records()
    judged(records, make(1.0, configs()[1], source="0" * 16), make(1.0, configs()[2], machine="cpu-aarch64-128"))
    assert records.lookup(linear, CALL, HOST) is None
    assert [n for n in records.notes if "2 tuning records of cpu.linear are ignored" in n]


def test_a_value_that_the_space_no_longer_has_is_not_used() -> None:
    records = L.Records()
    judged(records, make(2.0, configs()[3]), make(1.0, {**configs()[0], "row_block": 7}))
    found = records.lookup(linear, CALL, HOST)
    assert found is not None
    assert found.config == configs()[3]


def test_source_hash_sees_code_and_neither_comments_nor_imports(tmp_path: Path) -> None:
    texts = ['"""Doc."""\nX = 1\n"""About X."""\n', "from a import b\n# comment\nX = 1  # one\n", "X = 2\n"]
    hashes = []
    for i, text in enumerate(texts):
        path = tmp_path / f"m{i}.py"
        path.write_text(text)
        hashes.append(R._code_hash(str(path)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_source_hash_is_of_the_code_and_not_of_the_python_that_reads_it(tmp_path: Path) -> None:
    """A function has fields in Python 3.12 that it has not in 3.11; both find the same shipped records."""
    path = tmp_path / "m.py"
    path.write_text("def f(a, *b, c=None):\n    return f'{a!r:>4} {b}' if a is not None else [*b]\n\n\nclass C(int):\n    pass\n")
    assert R._code_hash(str(path)) == "74c7fbd675eb7192"


def test_shipped_records_are_whole_and_of_known_families() -> None:
    shipped = L.load([L.SHIPPED])
    assert shipped.notes == []
    for record in shipped.entries.values():
        assert json.loads(record.config)
        assert record.seconds is None or record.seconds > 0
