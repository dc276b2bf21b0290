"""The portable kernels with the limits of other GPUs, on an NVIDIA GPU: right logits, and speed beside the native path.

On a machine with the compiler (no GPU needed), then on the one with the GPU (no compiler needed: numpy, torch, tvm_ffi)::

    python benchmarks/portable.py prepare FOLDER [--only NAMES]
    PYTHONPATH=. python benchmarks/portable.py run FOLDER

``prepare`` compiles a llama of 1.2 billion parameters natively, and by the portable families alone with the limits of each other
kind of GPU (threads, shared memory, vectors, registers, lane exchange); TVM's CUDA code generator makes the code. Matrix
instructions of other vendors do not exist there: mma stands in for them. Waves of 64 cannot run on NVIDIA GPUs, so CDNA is left
out.
``run`` fills in random weights, compares prefill, decode and a ragged mix with torch in float32, and writes ``FOLDER/portable.md``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cuda_smoke import MODELS, TOLERANCE, Runner, _check, _decode_speed, fill_weights, headers_only, write_model
from benchmarks.cuda_steps import drop_runtime

MODEL = "1b"
NATIVE = "cuda:sm_90a"
LENT = ("cuda:sm_80", "rocm:gfx1100", "metal:apple8", "opencl:generic")
PREFILL = 2048
_STATIC = 48 << 10
"""Bytes of shared memory in arrays of fixed size that CUDA allows, whatever the GPU has."""


@contextmanager
def lend(spec: str) -> Iterator[None]:
    """Within it the target :data:`NATIVE` has the limits of ``spec``, and the portable kernel families only."""
    from llmc import targets
    from llmc.targets import cuda, gpu
    from llmc.targets.base import GpuTarget

    own, limits = targets.parse(NATIVE), targets.parse(spec)
    assert isinstance(own, GpuTarget) and isinstance(limits, GpuTarget) and limits.warp_size == own.warp_size
    lent = replace(
        limits,
        name=own.name,
        kind=own.kind,
        mcpu=own.mcpu,
        triple=own.triple,
        shared_arrays=min(limits.shared_arrays, _STATIC),
        matrix=None if limits.matrix is None else own.matrix,
    )
    with mock.patch.object(cuda, "parse", lambda _: lent), mock.patch.object(cuda, "families", gpu.families):
        yield


def prepare(folder: Path, names: list[str]) -> None:
    """Compile the model once for each of ``names``, without weights."""
    from llmc.compiler import compile as compile_model

    source = folder / "model"
    write_model(source, {**MODELS[MODEL], "max_position_embeddings": PREFILL}, zeros=True)
    for name in names:
        start, out = time.perf_counter(), folder / name.replace(":", "-")
        with headers_only(), lend(name) if name != NATIVE else nullcontext():
            compile_model(str(source), out=out, target=NATIVE, dtype="bfloat16", max_batch=16, page_size=16, force=True)
        drop_runtime(out)
        print(f"{name}: compiled in {time.perf_counter() - start:.1f} s", flush=True)
    shutil.rmtree(source)


def _prefill_speed(folder: Path) -> float:
    """Tokens per second of a prompt of :data:`PREFILL` tokens, the best of three."""
    runner, times = Runner(folder, True, 4 * PREFILL // 16), []
    for _ in range(3):
        sequence = runner.sequence([1] * PREFILL)
        start = time.perf_counter()
        runner.step((sequence, PREFILL, 1))
        times.append(time.perf_counter() - start)
    runner.executor.close()
    return PREFILL / min(times)


def run(folder: Path) -> int:
    """Check and time every artifact; 1 if one is wrong. Logits are asked for: the portable modules have no sampling."""
    from llmc.runtime.gpu import cuda

    with mock.patch.object(cuda, "FUNCTIONS", ("decode", "extend")):
        return _run(folder)


def _run(folder: Path) -> int:
    native: tuple[float, ...] | None = None
    weights: Path | None = None
    lines, wrong = [], 0
    for name in (NATIVE, *LENT):
        artifact = folder / name.replace(":", "-")
        if not (artifact / "manifest.json").is_file():
            continue
        if weights is None:
            fill_weights(artifact)
            weights = artifact / "weights"
        else:  # the same numbers for all
            for path in weights.glob("*.safetensors"):
                (artifact / "weights" / path.name).unlink(missing_ok=True)
                os.link(path, artifact / "weights" / path.name)
        prefill, decode = _check(MODEL, artifact, True)
        right = prefill < TOLERANCE["bfloat16"] and decode < TOLERANCE["bfloat16"]  # NaN is not
        wrong += not right
        speeds = (_decode_speed(artifact, True, 1)[2], 8 * _decode_speed(artifact, True, 8)[2], _prefill_speed(artifact))
        if name == NATIVE:
            native = speeds
        cells = [f"{speed:.0f}" for speed in speeds]
        if native is not None:
            cells = [f"{cell} ({speed / best:.2f})" for cell, speed, best in zip(cells, speeds, native, strict=True)]
        label = "native" if name == NATIVE else f"portable, limits of `{name}`"
        lines.append(f"| {label} | {'right' if right else 'WRONG'}, {prefill:.1e} / {decode:.1e} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    table = (
        "| kernels | logits against float32 torch: prefill / decode error | decode tok/s, batch 1 | batch 8 | "
        f"prefill tok/s, {PREFILL} tokens |\n|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    (folder / "portable.md").write_text(table, encoding="utf-8")
    print(table)
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join((NATIVE, *LENT)), help="comma-separated targets to compile for")
    args = parser.parse_args()
    if args.what == "run":
        return run(args.folder)
    prepare(args.folder, args.only.split(","))
    return 0


if __name__ == "__main__":
    sys.exit(main())
