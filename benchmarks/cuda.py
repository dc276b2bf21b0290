"""Decoding, prefill and start-up on an NVIDIA GPU, beside what its memory could deliver and beside other systems.

    python benchmarks/cuda.py prepare FOLDER                 with llmc's compiler; needs no GPU and little disk
    python benchmarks/cuda.py run FOLDER [--peer SCRIPT]     on the GPU: numpy, torch, tvm_ffi and TVM's runtime libraries

``prepare`` compiles llama models of 1.2 and 8 billion parameters for each weight format and keeps of their weights only the
files' headers, so that the folder is small enough to carry. ``run`` fills them with random numbers, times every model through
``llmc.load`` (process start to first token in a process of its own), and writes ``FOLDER/cuda.md``. ``--peer``: a program that
prints one JSON object a line with ``bench`` (``decode``, ``prefill``), ``model``, ``weights``, ``batch`` or ``tokens``, and
``tok_s``; it runs in between, on the same GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from cuda_smoke import MODELS, fill_weights, headers_only, write_model

CONTEXT, NEW = 128, 256
PREFILL = (512, 2048, 8192)
LIMIT_BATCH = 128
PEER_SECONDS = 300


@dataclass(frozen=True)
class Subject:
    """A model in a weight format, and the batches it is timed at."""

    model: str
    quant: str | None
    batches: tuple[int, ...]
    prefill: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model}-{self.quant or 'bf16'}"


BATCHES = (1, 8, 32, 64, LIMIT_BATCH)
SUBJECTS = (
    Subject("8b", None, BATCHES, PREFILL),
    Subject("8b", "int4_g128", BATCHES, PREFILL),
    Subject("8b", "int8", BATCHES, PREFILL),
    Subject("8b", "fp8_e4m3", BATCHES, PREFILL),
    Subject("1b", None, (1, 8), (512, 2048)),
    Subject("1b", "int4_g128", (1, 8), (512, 2048)),
)


def prepare(folder: Path, target: str, only: str) -> None:
    """Compile every subject whose name contains ``only``."""
    from llmc.compiler import compile as compile_model

    for subject in (s for s in SUBJECTS if only in s.name):
        start = time.perf_counter()
        source, out = folder / f"{subject.name}.model", folder / subject.name
        write_model(source, {**MODELS[subject.model], "max_position_embeddings": 16384}, zeros=True)
        options = {"target": target, "dtype": "bfloat16", "quant": subject.quant, "max_batch": LIMIT_BATCH, "context": 8320}
        with headers_only():
            compile_model(str(source), out=out, force=True, **options)
        shutil.rmtree(source)
        print(f"{subject.name}: compiled for {target} in {time.perf_counter() - start:.1f} s", flush=True)


def _measure(subject: Subject, folder: Path, read_limit: float) -> list[dict[str, Any]]:
    """Every figure of one subject through the public API."""
    import llmc
    from llmc.bench import bytes_per_token
    from llmc.runtime.footprint import footprint

    rows = []
    free = _free_memory()
    model = llmc.load(folder, context=8320, kv_memory=24 << 30)
    vocab, rng = model.manifest.model.vocab_size, np.random.default_rng(0)
    for batch in subject.batches:
        prompts = [rng.integers(0, vocab, CONTEXT).tolist() for _ in range(batch)]
        model.generate(prompts, max_tokens=24, ignore_eos=True)
        speeds = [_decode(model, prompts) for _ in range(3)]
        speed = statistics.median(speeds)
        weights = bytes_per_token(model.manifest, 0)
        assert weights is not None
        moved = weights + batch * model.manifest.kv.bytes_per_token * (CONTEXT + NEW / 2)
        rows.append(
            {"bench": "decode", "model": subject.model, "weights": subject.quant or "bf16", "batch": batch, "tok_s": speed,
             "share": moved * speed / batch / read_limit, "spread": (max(speeds) - min(speeds)) / speed}
        )  # fmt: skip
    for tokens in subject.prefill:
        prompt = rng.integers(0, vocab, tokens).tolist()
        model.generate(prompt, max_tokens=1)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            model.generate(prompt, max_tokens=1, ignore_eos=True)
            times.append(time.perf_counter() - start)
        rows.append(
            {"bench": "prefill", "model": subject.model, "weights": subject.quant or "bf16", "tokens": tokens,
             "tok_s": tokens / statistics.median(times)}
        )  # fmt: skip
    m, pages = model.manifest, model.executor.num_pages
    planned = footprint(m, m.variants[0]).total + pages * m.kv.page_bytes
    taken = free - _free_memory()
    rows.append({"bench": "memory", "model": subject.model, "weights": subject.quant or "bf16", "planned": planned, "taken": taken})
    model.close()
    return rows


def _free_memory() -> int:
    """Bytes of the GPU that are free."""
    from llmc.runtime.gpu.cudart import Cuda

    cuda = Cuda(0)
    free, _ = cuda.memory()
    cuda.close()
    return free


def _decode(model: Any, prompts: list[list[int]]) -> float:
    """Tokens per second over all sequences, from when the last of them has its first token."""
    waiting, start, counted = set(range(len(prompts))), 0.0, 0
    for event in model.generate(prompts, max_tokens=NEW, ignore_eos=True, stream=True):
        if waiting:
            waiting.discard(event.index)
            start = time.perf_counter()
        else:
            counted += len(event.token_ids)
    return counted / (time.perf_counter() - start)


def _first_token(folder: Path) -> float:
    """Seconds from the start of a process to the first token of a prompt, the weights in the page cache."""
    code = f"import llmc; m = llmc.load({str(folder)!r}, context=512); m.generate([1] * 16, max_tokens=1, ignore_eos=True)"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    return time.perf_counter() - start


def _ceilings() -> tuple[str, float, float]:
    """The GPU's name; bytes per second that it moves; bf16 operations per second of a large product."""
    import torch

    def seconds(work: Callable[[], Any], count: int = 8) -> float:
        work()
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                work()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / count)
        return statistics.median(times)

    array = torch.randn(1 << 30, device="cuda", dtype=torch.float32)
    target = torch.empty_like(array)
    nbytes = array.numel() * array.element_size()
    moved = max(nbytes / seconds(array.sum), nbytes / seconds(array.amax), 2 * nbytes / seconds(lambda: target.copy_(array)))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return torch.cuda.get_device_name(), moved, 2 * 8192**3 / seconds(lambda: a @ b)


def _peers(command: list[str]) -> list[dict[str, Any]]:
    """The JSON lines that ``command`` prints within :data:`PEER_SECONDS`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PEER_SECONDS)
        text, ended = done.stdout, f"ended with {done.returncode}: {done.stderr.strip()[-600:]}" if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        text, ended = (late.stdout or b"").decode(errors="replace"), f"was stopped after {PEER_SECONDS} s"
    if ended:
        print(f"the peer {' '.join(command)} {ended}", flush=True)
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    for line in found:
        print(json.dumps(line), flush=True)
    return found


def run(folder: Path, only: str, peers: list[str]) -> None:
    import torch

    device, read_limit, flops = _ceilings()
    torch.cuda.empty_cache()
    print(f"{device}: {read_limit / 1e12:.2f} TB/s, {flops / 1e12:.0f} TFLOP/s bf16", flush=True)
    rows: list[dict[str, Any]] = []
    starts: dict[str, float] = {}
    for subject in (s for s in SUBJECTS if only in s.name and (folder / s.name).is_dir()):
        artifact = folder / subject.name
        fill_weights(artifact)
        found = _measure(subject, artifact, read_limit)
        starts[subject.name] = _first_token(artifact)
        for row in found:
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        print(f"{subject.name}: first token {starts[subject.name]:.2f} s after the process started", flush=True)
        rows += found
        shutil.rmtree(artifact / "weights")
    theirs = [line for command in peers for line in _peers(command.split())]
    text = to_markdown(device, read_limit, flops, rows, starts, theirs)
    (folder / "cuda.md").write_text(text, encoding="utf-8")
    print(text)


def _peer_speed(row: dict[str, Any], theirs: list[dict[str, Any]]) -> tuple[float, str] | None:
    """The fastest peer's tokens per second in the same test, and its name."""
    same = [
        (float(p["tok_s"]), str(p.get("system", "peer")))
        for p in theirs
        if p.get("bench") == row["bench"] and "tok_s" in p
        and str(p.get("model", "")).lower().endswith(row["model"])
        and (p.get("batch") == row.get("batch") if row["bench"] == "decode" else p.get("tokens") == row.get("tokens"))
        and _bits(p.get("weights", "bf16")) == _bits(row["weights"])
    ]  # fmt: skip
    return max(same) if same else None


def _bits(weights: str) -> int:
    """Bits of a weight in a format: ``bf16``, ``int4_g128``, ``fp8_e4m3``."""
    return int("".join(c for c in weights.split("_")[0] if c.isdigit()))


def to_markdown(
    device: str, read_limit: float, flops: float, rows: list[dict[str, Any]], starts: dict[str, float], theirs: list[dict[str, Any]]
) -> str:
    """The tables, with machine and versions."""
    import torch

    from llmc.version import __version__

    lines = [
        f"# llmc on {device}", "",
        f"llmc {__version__}, Python {platform.python_version()}, torch {torch.__version__} (peer), random weights. "
        f"Limits measured in this run: {read_limit / 1e12:.2f} TB/s of memory, {flops / 1e12:.0f} TFLOP/s in bf16.", "",
        f"## Decode: {CONTEXT} tokens of context, {NEW} new", "",
        "| model | weights | batch | tok/s | of the memory limit | peer, tok/s | ours / peer |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in (r for r in rows if r["bench"] == "decode"):
        peer = _peer_speed(row, theirs)
        cells = (f"{peer[0]:.0f} ({peer[1]})", f"{row['tok_s'] / peer[0]:.2f}") if peer else ("", "")
        ours = (row["model"], row["weights"], str(row["batch"]), f"{row['tok_s']:.0f}", f"{row['share']:.0%}")
        lines.append(f"| {' | '.join((*ours, *cells))} |")
    lines += [
        "",
        "## Prefill",
        "",
        "| model | weights | tokens | tok/s | peer, tok/s | ours / peer |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in (r for r in rows if r["bench"] == "prefill"):
        peer = _peer_speed(row, theirs)
        cells = (f"{peer[0]:.0f} ({peer[1]})", f"{row['tok_s'] / peer[0]:.2f}") if peer else ("", "")
        lines.append(f"| {row['model']} | {row['weights']} | {row['tokens']} | {row['tok_s']:.0f} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "## Memory of the GPU: the plan that `llmc inspect` prints with 24 GiB of KV pages, and what was taken after all tests",
        "",
        "| model | weights | planned, GB | taken, GB | difference |",
        "|---|---|---:|---:|---:|",
    ]
    for row in (r for r in rows if r["bench"] == "memory"):
        planned, taken = row["planned"] / 1e9, row["taken"] / 1e9
        lines.append(f"| {row['model']} | {row['weights']} | {planned:.2f} | {taken:.2f} | {taken / planned - 1:+.1%} |")
    lines += ["", "## Process start to first token, weights in the page cache", "", "| artifact | seconds |", "|---|---:|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in starts.items()]
    lines += [
        "",
        "Commands: `benchmarks/cuda.py prepare FOLDER` with a compiler, `benchmarks/cuda.py run FOLDER --peer COMMAND` on the GPU.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--peer", action="append", default=[], metavar="COMMAND")
    args = parser.parse_args()
    if args.what == "prepare":
        prepare(args.folder, args.target, args.only)
    else:
        run(args.folder, args.only, args.peer)


if __name__ == "__main__":
    main()
