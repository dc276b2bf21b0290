"""Is a step on a GPU one graph with no gap behind it, and are its tokens those that the host would sample?

On a machine with the compiler (no GPU needed), then on the one with the GPU (no compiler needed: numpy, torch, tvm_ffi)::

    python benchmarks/cuda_steps.py prepare FOLDER [--models small,1b]
    PYTHONPATH=. python benchmarks/cuda_steps.py run FOLDER

``run`` generates the same prompts twice, once with logits copied to the host and sampled there and once with tokens chosen on the
device and the host running ahead, compares the tokens, and prints for each batch size the time of a step by the wall clock and
by the device's own, and what choosing a token costs. One table last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cuda_smoke import KEPT_HEADER, MODELS, fill_weights, headers_only, write_model

PROMPT, TOKENS = 8, 96
"""Prompts short enough that all of them run in one step: the batch decodes together from the start."""

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0, "seed": 3},
    "top-p": {"temperature": 0.8, "top_p": 0.9, "seed": 4},
    "all": {"temperature": 1.2, "top_k": 100, "top_p": 0.95, "min_p": 0.001, "seed": 5, "repetition_penalty": 1.2,
            "presence_penalty": 0.3, "frequency_penalty": 0.1},
}  # fmt: skip


def prepare(folder: Path, target: str, names: list[str], max_batch: int) -> None:
    """Compile the models into ``folder``, of the large ones without weights."""
    from llmc.compiler import compile as compile_model

    for name in names:
        source, out = folder / f"{name}.model", folder / name
        write_model(source, MODELS[name], zeros=name in KEPT_HEADER)
        with headers_only() if name in KEPT_HEADER else nullcontext():
            compile_model(str(source), out=out, target=target, dtype="bfloat16", max_batch=max_batch, page_size=16, force=True)
        shutil.rmtree(source)
        drop_runtime(out)
        print(f"{name}: compiled for {target}")


def drop_runtime(artifact: Path) -> None:
    """Leave TVM's libraries out of an artifact: where it will run they are installed."""
    shutil.rmtree(artifact / "runtime", ignore_errors=True)
    path = artifact / "manifest.json"
    contents = json.loads(path.read_text())
    contents["files"] = {name: info for name, info in contents["files"].items() if not name.startswith("runtime/")}
    path.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n")


class HostSampling:
    """An executor as it is without a pipeline: logits go to the host for every token."""

    pipeline = None

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


class Runs:
    """An artifact on the GPU. ``load_seconds``: from nothing to weights on the device."""

    def __init__(self, artifact: Path, batch: int) -> None:
        from llmc.runtime.artifact import open_artifact
        from llmc.runtime.footprint import footprint
        from llmc.runtime.gpu.cuda import CudaExecutor
        from llmc.runtime.gpu.executor import StepTimer
        from llmc.runtime.model import Model

        opened = open_artifact(artifact)
        m = opened.manifest
        self.free = self._free_memory()
        pages = batch * (-(-(PROMPT + TOKENS + 8) // m.kv.page_size) + 1)
        self.planned = footprint(m, opened.variant).total + pages * m.kv.page_bytes
        start = time.perf_counter()
        self.executor = CudaExecutor(opened, pages)
        self.load_seconds = time.perf_counter() - start
        self.models = {True: Model(opened.manifest, self.executor, artifact)}
        self.models[False] = Model(opened.manifest, HostSampling(self.executor), artifact)
        self.vocab = opened.manifest.model.vocab_size
        self.depth = self.executor.pipeline.depth
        self.timer = StepTimer(self.executor.driver)

    @staticmethod
    def _free_memory() -> int:
        from llmc.runtime.gpu.cudart import Cuda

        cuda = Cuda(0)
        free = cuda.memory()[0]
        cuda.close()
        return free

    def used(self) -> int:
        """Bytes of the device that the artifact has taken."""
        return self.free - self._free_memory()

    def prompts(self, batch: int) -> list[list[int]]:
        rng = np.random.default_rng(batch)
        return [[int(t) for t in rng.integers(0, self.vocab, PROMPT)] for _ in range(batch)]

    def tokens(self, batch: int, on_device: bool, **options: Any) -> list[list[int]]:
        found = self.models[on_device].generate(self.prompts(batch), max_tokens=TOKENS, ignore_eos=True, **options)
        return [c.token_ids for c in (found if isinstance(found, list) else [found])]

    def step_times(self, batch: int, on_device: bool, **options: Any) -> tuple[float, float]:
        """Seconds of a decode step by the wall clock and by the device's. The prompts' steps are left out, and the first ones."""
        events = self.models[on_device].generate(self.prompts(batch), max_tokens=TOKENS, ignore_eos=True, stream=True, **options)
        for _ in range(8 * batch):
            next(events)
        self.executor.timer = self.timer
        self.executor.driver.synchronize()
        start = time.perf_counter()
        for _ in range((TOKENS - 8) * batch):
            last = next(events)
        wall = time.perf_counter() - start
        assert last.finish_reason == "length"
        device = self.timer.seconds()
        self.executor.timer = None
        ahead = self.depth - 1 if on_device else 0  # these were in flight when the clocks started: the device's does not count them
        steps = TOKENS - 8 - ahead
        return wall / steps, device / steps

    def choice_time(self, batch: int, **options: Any) -> float:
        """Seconds of the device for choosing the tokens of a step."""
        self.tokens(batch, True, **options)  # leaves its logits, records and shapes behind
        self.timer.seconds()
        with self.timer.step():
            for _ in range(20):
                self.executor._sample(batch, "seq_lens")
        return self.timer.seconds() / 20


def run(folder: Path, batches: list[int]) -> int:
    """Check and time every artifact of ``folder``; 1 if tokens differ."""
    lines, memory, wrong = [], [], 0
    for artifact in sorted(p for p in folder.iterdir() if (p / "manifest.json").is_file()):
        fill_weights(artifact)
        runs = Runs(artifact, max(batches))
        for batch in batches:
            for way, options in WAYS.items():
                host, device = (runs.tokens(batch, on_device, **options) for on_device in (False, True))
                same = sum(a == b for a, b in zip(host, device, strict=True))
                again = sum(a == b for a, b in zip(host, runs.tokens(batch, False, **options), strict=True))
                if same < batch:
                    where = [int(np.argmax(np.array(a) != b)) for a, b in zip(host, device, strict=True)]
                    print(f"{artifact.name}, batch {batch}, {way}: first difference of each row: {where}")
                wrong += way == "greedy" and same < batch
                if way == "greedy" or batch == max(batches):
                    hosted = runs.step_times(batch, False, **options)[0]
                    wall, busy = runs.step_times(batch, True, **options)
                    timed = f"{hosted * 1e3:.3f} | {wall * 1e3:.3f} | {busy * 1e3:.3f} | {1 - busy / wall:.1%} | {batch / wall:.0f}"
                else:
                    timed = " | | | | "
                choice = runs.choice_time(batch, **options) * 1e6
                tokens = f"{same}/{batch} | {again}/{batch}"
                line = f"| {artifact.name} | {batch} | {way} | {tokens} | {timed} | {choice:.1f} | {runs.load_seconds:.2f} |"
                print(line, flush=True)  # something is known even if what follows fails
                lines.append(line)
        memory.append(f"{artifact.name}: {runs.planned / 1e6:.0f} MB planned, {runs.used() / 1e6:.0f} MB taken")
        runs.executor.close()
    print("| model | batch | sampling | same | host again | host ms | wall ms | device ms | gap | tok/s | choice us | load s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join([*lines, "", *memory]))
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--models", default="small,1b")
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--batches", default="1,8,64")
    args = parser.parse_args()
    if args.what == "run":
        return run(args.folder, [int(b) for b in args.batches.split(",")])
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.folder, args.target, args.models.split(","), args.max_batch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
