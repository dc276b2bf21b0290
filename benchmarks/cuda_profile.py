"""Where the time of a step goes on a GPU: every kernel of a decode step and of a prefill chunk, by the driver's own clock.

    python benchmarks/cuda_smoke.py prepare FOLDER --models 1b        where llmc and nvcc are; needs no GPU
    PYTHONPATH=. python benchmarks/cuda_profile.py FOLDER/1b [--batch 1,8] [--context 128] [--rows 512]

Kernels are timed by CUPTI through torch's profiler while the step's CUDA graph is replayed. With programmatic dependent launch a
kernel starts while those before it run, and waits: what counts is how much later it ends than the one before, and that is what is
printed. ``share`` is of the step's wall time; the rest of it is gaps between kernels and the host.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from cuda_smoke import Runner, fill_weights


def profiled(work: Callable[[], Any], steps: int) -> tuple[Counter[str], Counter[str]]:
    """Calls, and microseconds added to the time line, by kernel over ``steps`` calls of ``work``."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            work()
        torch.cuda.synchronize()
    calls: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    on_device = [e for e in profiler.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    reached = 0.0
    for event in sorted(on_device, key=lambda e: e.time_range.end):
        calls[event.name] += 1
        micros[event.name] += event.time_range.end - max(event.time_range.start, reached)
        reached = event.time_range.end
    return calls, micros


def report(what: str, work: Callable[[], Any], steps: int) -> None:
    """Print the kernels of ``work``, the most expensive first."""
    work()
    start = time.perf_counter()
    for _ in range(steps):
        work()
    wall = (time.perf_counter() - start) / steps * 1e6
    calls, micros = profiled(work, steps)
    total = sum(micros.values()) / steps
    print(f"\n{what}: {wall:.0f} us of wall time, {total:.0f} us in {sum(calls.values()) / steps:.0f} kernels and copies")
    print(f"{'kernel':60} {'calls':>6} {'us each':>8} {'us':>8} {'share':>6}")
    for name, spent in micros.most_common(24):
        count = calls[name]
        print(f"{name[:60]:60} {count / steps:6.0f} {spent / count:8.2f} {spent / steps:8.1f} {spent / steps / wall:6.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    fill_weights(args.artifact)
    for batch in (int(b) for b in args.batch.split(",")):
        runner = Runner(args.artifact, True, batch * 64)
        sequences = [runner.sequence([1] * (args.context + 4 * args.steps)) for _ in range(batch)]
        for sequence in sequences:
            runner.step((sequence, args.context, 1))
        report(f"decode, batch {batch}", lambda r=runner, s=sequences: r.step(*((x, 1, 1) for x in s)), args.steps)  # type: ignore[misc]
        runner.executor.close()
    runner = Runner(args.artifact, True, 4096)
    most = runner.manifest.limits.max_rows
    text = np.random.default_rng(0).integers(0, runner.manifest.model.vocab_size, args.rows).tolist()

    def prefill() -> None:
        sequence = runner.sequence(text)
        for done in range(0, args.rows, most):
            runner.step((sequence, min(most, args.rows - done), 1))
        sequence.table.release()

    report(f"prefill of {args.rows} tokens", prefill, 4)
    runner.executor.close()


if __name__ == "__main__":
    main()
