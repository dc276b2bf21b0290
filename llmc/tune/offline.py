"""The runner of a folder that ``llmc tune --offline`` packed: times all candidates, task by task, and writes records.

    python run.py [--out results.jsonl] [--rounds 7]

Each task runs in a process of its own, which a candidate may crash or hang: then that one has failed, and the task goes on without
it. Candidates are timed in rounds, one after the other, so that a slow moment of the machine touches all of them alike. Thin:
NumPy, ``tvm_ffi`` and the TVM runtime.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from llmc.schedules.records import Record, call_from_json, config_text, parse_line

SILENCE = 120.0
"""Seconds without a word from a task's process before it counts as hanging."""


def spread(samples: list[float]) -> float:
    """The distance between the quartiles over the median."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def record(
    pack: dict[str, Any], task: dict[str, Any], config: Any, symbols: dict[str, int], device: str, samples: list[float], error: str
) -> Record:
    """One result. ``error`` is empty unless the candidate failed."""
    return Record(
        family=task["family"],
        call=call_from_json(task["call"]),
        symbols=tuple(sorted(symbols.items())),
        target=pack["target"],
        machine=pack["machine"],
        device=device,
        config=config_text(config),
        seconds=None if error else float(f"{statistics.median(samples):.4g}"),
        spread=0.0 if error else round(spread(samples), 3),
        error=error,
        source=task["source"],
        versions=pack["versions"],
    )


def _child(folder: Path, number: int, skipped: set[int], rounds: int) -> None:
    """One task. Says ``at N`` before it touches candidate N, ``record {...}`` for each result, in JSON lines on stdout."""
    from llmc.runtime.library import import_ffi
    from llmc.tune.bench import Bench
    from llmc.tune.devices import open_device

    pack = json.loads((folder / "pack.json").read_text(encoding="utf-8"))
    task = pack["tasks"][number]
    device = open_device(pack["kind"])
    with np.load(folder / f"task{number:03}.npz") as saved:
        wanted = [saved[name] for name in saved.files]
    bench = Bench(device, call_from_json(task["call"]), task["sizes"], wanted)
    libraries: dict[str, Any] = {}
    timers: dict[int, Any] = {}

    def say(r: Record) -> None:
        print("record " + r.line(), flush=True)

    print(f"device {device.name}", flush=True)
    for i, candidate in enumerate(task["candidates"]):
        if i in skipped:
            continue
        print(f"at {i}", flush=True)
        try:
            library = candidate["library"]
            if library not in libraries:
                libraries[library] = import_ffi().load_module(str(folder / library))
            kernel = libraries[library][candidate["symbol"]]
            bench.check(kernel)
            timers[i] = bench.timers(kernel)
        except Exception as error:  # a candidate may fail in any way
            for symbols in task["sizes"]:
                say(record(pack, task, candidate["config"], symbols, device.name, [], _sentence(error)))
            if "illegal" in str(error) or "unspecified launch" in str(error):
                sys.exit(3)  # the CUDA context is gone with it
    samples: dict[int, list[list[float]]] = {i: [[] for _ in task["sizes"]] for i in timers}
    for _ in range(rounds):
        for i, at_sizes in timers.items():
            print(f"at {i}", flush=True)
            for size, timer in enumerate(at_sizes):
                samples[i][size].append(timer())
    for i, at_sizes in samples.items():
        for size, symbols in enumerate(task["sizes"]):
            say(record(pack, task, task["candidates"][i]["config"], symbols, device.name, at_sizes[size], ""))
    print("done", flush=True)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}"


def _run_task(folder: Path, number: int, rounds: int, out: Path) -> dict[int, Record]:
    """Run one task to its end, whatever its candidates do; writes the records and returns the best candidate's by size."""
    pack = json.loads((folder / "pack.json").read_text(encoding="utf-8"))
    task = pack["tasks"][number]
    skipped: set[int] = set()
    device = "unknown"
    found: list[Record] = []
    while True:
        command = [sys.executable, str(folder / "run.py"), "--child", str(number), "--rounds", str(rounds)]
        process = subprocess.Popen([*command, "--skip", ",".join(map(str, sorted(skipped)))], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda p=process, q=lines: [*map(q.put, p.stdout), q.put("")], daemon=True).start()
        at, ended, reason = -1, False, ""
        while True:
            try:
                line = lines.get(timeout=SILENCE)
            except queue.Empty:
                process.kill()
                reason = f"no sign of life for {SILENCE:g} s"
                break
            if not line:
                break
            kind, _, rest = line.rstrip("\n").partition(" ")
            if kind == "at":
                at = int(rest)
            elif kind == "device":
                device = rest
            elif kind == "record":
                found.append(parse_line(rest))
            elif kind == "done":
                ended = True
        status = process.wait()
        if ended or at < 0:
            if not ended:
                print(f"{task['label']}: the task's process ended with status {status} before its first candidate", file=sys.stderr)
            break
        skipped.add(at)
        if status != 3:
            for symbols in task["sizes"]:
                why = reason or f"the process ended with status {status}"
                found.append(record(pack, task, task["candidates"][at]["config"], symbols, device, [], why))
    with out.open("a", encoding="utf-8") as file:
        file.writelines(r.line() + "\n" for r in found)
    return _report(task, found)


def _report(task: dict[str, Any], found: list[Record]) -> dict[int, Record]:
    best: dict[int, Record] = {}
    default = config_text(task["candidates"][0]["config"]) if task["candidates"] else ""
    failed = len({r.config for r in found if r.seconds is None})
    for i, symbols in enumerate(task["sizes"]):
        timed = {r.config: r for r in found if r.seconds is not None and dict(r.symbols) == symbols}
        if not timed:
            continue
        best[i] = min(timed.values(), key=lambda r: r.seconds or 0.0)
        first = timed.get(default)
        gain = f"default {(first.seconds or 0) * 1e6:.2f} us" if first else "default failed"
        sizes = " ".join(f"{k}={v}" for k, v in symbols.items())
        print(
            f"{task['label']} {sizes}: best {(best[i].seconds or 0) * 1e6:.2f} us {best[i].config}, {gain}; "
            f"{len(timed)} timed, {failed} failed",
            flush=True,
        )
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the packed kernels on this machine and write records.")
    parser.add_argument("--out", type=Path, default=None, help="file for the records (default: results.jsonl beside run.py)")
    parser.add_argument("--rounds", type=int, default=7, help="times each candidate is measured (default: 7)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--skip", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(sys.argv[0]).resolve().parent
    if args.child is not None:
        _child(folder, args.child, {int(n) for n in args.skip.split(",") if n}, args.rounds)
        return 0
    out = args.out or folder / "results.jsonl"
    tasks = json.loads((folder / "pack.json").read_text(encoding="utf-8"))["tasks"]
    timed = sum(bool(_run_task(folder, number, args.rounds, out)) for number in range(len(tasks)))
    print(f"{timed} of {len(tasks)} tasks timed; records in {out}")
    return 0 if timed else 1
