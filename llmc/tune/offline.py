"""The runner of a folder that ``llmc tune --offline`` packed: times all candidates, task by task, and writes records.

    python run.py [--out results.jsonl] [--rounds 7] [--ahead 0]

Each task runs in a process of its own, which a candidate may crash or hang: then that one has failed, and the task goes on without
it. Candidates are timed in rounds, one after the other, so that a slow moment of the machine touches all of them alike; in the end
the fastest ones once more beside the default. Thin: NumPy, ``tvm_ffi`` and the TVM runtime.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmc.schedules.records import Record, call_from_json, config_text, parse_line

FINALISTS, FINAL_ROUNDS, FINALS = 3, 11, 4
"""So many of the fastest are timed again beside the default, in turns, and what they took then counts: the fastest of many is
partly the luckiest. Repeated, at most so often, until the fastest is one of those."""

SILENCE = 120.0
"""Seconds without a word from a task's process before it counts as hanging."""


def spread(samples: list[float]) -> float:
    """The distance between the quartiles over the median."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def record(
    pack: dict[str, Any],
    task: dict[str, Any],
    candidate: dict[str, Any],
    symbols: dict[str, int],
    device: str,
    samples: list[float],
    error: str,
) -> Record:
    """One result. ``error`` is empty unless the candidate failed."""
    return Record(
        family=task["family"],
        call=call_from_json(task["call"]),
        symbols=tuple(sorted(symbols.items())),
        target=pack["target"],
        machine=pack["machine"],
        device=device,
        config=config_text(candidate["config"]),
        seconds=None if error else float(f"{statistics.median(samples):.4g}"),
        spread=0.0 if error else round(spread(samples), 3),
        error=error,
        source=candidate["source"],
        versions=pack["versions"],
    )


def _child(folder: Path, number: int, skipped: set[int], rounds: int) -> None:
    """One task. Prepares it and waits for a line on stdin; then says ``at N`` before it touches candidate N, ``record {...}`` for
    each result, in lines on stdout."""
    from llmc.runtime.library import import_ffi
    from llmc.tune import inputs
    from llmc.tune.bench import Before, Bench
    from llmc.tune.devices import open_device

    pack = json.loads((folder / "pack.json").read_text(encoding="utf-8"))
    task = pack["tasks"][number]
    call, sizes = call_from_json(task["call"]), task["sizes"]
    with np.load(folder / f"task{number:03}.npz") as saved:
        packed, wanted = ([saved[name] for name in saved.files if name.startswith(kind)] for kind in ("packed", "wanted"))
    arrays = [inputs.make(call, symbols, packed=packed) for symbols in sizes]
    libraries: dict[str, Any] = {}

    def loaded(place: dict[str, Any]) -> Any:
        library = place["library"]
        if library not in libraries:
            libraries[library] = import_ffi().load_module(str(folder / library))
        return libraries[library][place["symbol"]]

    first = task["before"]
    if first is not None:
        call_before = call_from_json(first["call"])
        arrays_before = [inputs.make(call_before, symbols) for symbols in first["sizes"]]
    device = open_device(pack["kind"])
    sys.stdin.readline()
    before = None if first is None else Before(loaded(first), call_before, first["sizes"], arrays_before)
    bench = Bench(device, call, sizes, arrays, wanted, before)
    del arrays
    timers: dict[int, Any] = {}

    def say(r: Record) -> None:
        print("record " + r.line(), flush=True)

    print(f"device {device.name}", flush=True)
    for i, candidate in enumerate(task["candidates"]):
        if i in skipped:
            continue
        print(f"at {i}", flush=True)
        try:
            kernel = loaded(candidate)
            bench.check(kernel)
            timers[i] = bench.timers(kernel)
        except Exception as error:  # a candidate may fail in any way
            for symbols in task["sizes"]:
                say(record(pack, task, candidate, symbols, device.name, [], _sentence(error)))
            if "illegal" in str(error) or "unspecified launch" in str(error):
                sys.exit(3)  # the CUDA context is gone with it

    def timed(numbers: Iterable[int], times: int) -> dict[int, list[list[float]]]:
        """Samples of candidates at every size, taken in turns."""
        found: dict[int, list[list[float]]] = {i: [[] for _ in sizes] for i in numbers}
        for _ in range(times):
            for i, at_sizes in found.items():
                print(f"at {i}", flush=True)
                for timer, times_of in zip(timers[i], at_sizes, strict=True):
                    times_of.append(timer())
        return found

    samples = timed(timers, rounds)
    checked: set[int] = set()
    for _ in range(FINALS):
        ranked = sorted(samples, key=lambda i: _cost(samples[i]))
        if not ranked or ranked[0] in checked:
            break
        checked |= {*ranked[:FINALISTS], *({0} & samples.keys())}
        samples |= timed(sorted(checked), FINAL_ROUNDS)
    for i, at_sizes in samples.items():
        for size, symbols in enumerate(task["sizes"]):
            say(record(pack, task, task["candidates"][i], symbols, device.name, at_sizes[size], ""))
    print("done", flush=True)


def _cost(samples: list[list[float]]) -> float:
    """Mean of the logarithm of the median time over the sizes."""
    return statistics.fmean(math.log(statistics.median(column)) for column in samples)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}"


class _Task:
    """The process of one task, which prepares itself and then waits for :meth:`go`."""

    def __init__(self, folder: Path, number: int, rounds: int, skipped: set[int]) -> None:
        command = [sys.executable, str(folder / "run.py"), "--child", str(number), "--rounds", str(rounds)]
        self.process = subprocess.Popen(
            [*command, "--skip", ",".join(map(str, sorted(skipped)))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._pump, daemon=True).start()

    def _pump(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def go(self) -> None:
        """Let it touch the device's time."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def line(self) -> str:
        """The next line, empty once the process has ended. Raises queue.Empty after :data:`SILENCE` without one."""
        return self._lines.get(timeout=SILENCE)

    def end(self) -> int:
        """Wait until the process ends, and say how."""
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        return status


def _run_task(pack: dict[str, Any], number: int, start: Callable[[set[int]], _Task], out: Path) -> dict[int, Record]:
    """Run one task to its end, whatever its candidates do; writes the records and returns the best candidate's by size.

    ``start``: makes its process, without the candidates that ended another one."""
    task = pack["tasks"][number]
    skipped: set[int] = set()
    device = "unknown"
    found: list[Record] = []
    while True:
        child = start(skipped)
        child.go()
        at, ended, reason = -1, False, ""
        while True:
            try:
                line = child.line()
            except queue.Empty:
                child.process.kill()
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
                result = parse_line(rest)
                assert isinstance(result, Record)
                found.append(result)
            elif kind == "done":
                ended = True
        status = child.end()
        if ended or at < 0:
            if not ended:
                print(f"{task['label']}: the task's process ended with status {status} before its first candidate", file=sys.stderr)
            break
        skipped.add(at)
        if status != 3:
            for symbols in task["sizes"]:
                why = reason or f"the process ended with status {status}"
                found.append(record(pack, task, task["candidates"][at], symbols, device, [], why))
    with out.open("a", encoding="utf-8") as file:
        file.writelines(r.line() + "\n" for r in found)
    return _report(task, found)


def _run(folder: Path, rounds: int, out: Path, ahead: int) -> tuple[int, int]:
    """Run all tasks in turn, the next ``ahead`` preparing themselves meanwhile. How many were timed, of how many."""
    pack = json.loads((folder / "pack.json").read_text(encoding="utf-8"))
    total, timed = len(pack["tasks"]), 0
    waiting: dict[int, _Task] = {}

    def start(number: int, skipped: set[int]) -> _Task:
        return waiting.pop(number, None) or _Task(folder, number, rounds, skipped)

    try:
        for number in range(total):
            for next_one in range(number, min(number + 1 + ahead, total)):
                if next_one not in waiting:
                    waiting[next_one] = _Task(folder, next_one, rounds, set())
            timed += bool(_run_task(pack, number, partial(start, number), out))
    finally:
        for child in waiting.values():
            child.process.kill()
            child.end()
    return timed, total


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
    parser.add_argument("--ahead", type=int, default=0, help="tasks that are prepared while one is timed, on a GPU (default: 0)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--skip", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(sys.argv[0]).resolve().parent
    if args.child is not None:
        _child(folder, args.child, {int(n) for n in args.skip.split(",") if n}, args.rounds)
        return 0
    out = args.out or folder / "results.jsonl"
    timed, total = _run(folder, args.rounds, out, args.ahead)
    print(f"{timed} of {total} tasks timed; records in {out}")
    return 0 if timed else 1
