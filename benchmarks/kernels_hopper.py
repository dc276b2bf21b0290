"""The Hopper GEMM and prefill attention on an H100 or H200, checked and timed beside torch.

    python benchmarks/kernels_hopper.py build FOLDER    # where llmc and nvcc are; needs no GPU
    python benchmarks/kernels_hopper.py run FOLDER      # where the GPU is; needs torch, tvm_ffi and TVM's runtime libraries only

``run`` checks every result against torch in float32 first, then times calls in a CUDA graph over buffers that together do
not fit the L2 cache, and prints microseconds, TFLOP/s and torch's time over ours (cuBLAS; scaled_dot_product_attention on
contiguous keys and values).
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LINEAR = {"o": (4096, 4096), "qkv": (6144, 4096), "up": (14336, 4096), "down": (4096, 14336)}
LINEAR_ROWS = (64, 256, 512, 1024, 2048, 8192)
ATTEND = {"p16": (32, 8, 128, 16), "p64": (32, 8, 128, 64), "d64": (32, 8, 64, 16)}
ATTEND_BATCHES = ((1, 512, 512), (1, 2048, 2048), (1, 8192, 8192), (16, 512, 512), (1, 512, 8192))
"""Sequences, rows of each, positions of each."""

L2_BYTES = 320 << 20
TOLERANCE = 8e-3


def build(folder: Path) -> None:
    import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

    # isort: split
    import tvm

    from llmc import targets
    from llmc.schedules.cuda import gemm_hopper, prefill_attention
    from llmc.targets import cuda, cuda_tools
    from llmc.targets.link import linker

    target = targets.parse("cuda:sm_90a")
    functions, cases = {}, []

    def add(name: str, family: Any, call: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
        space = family.space(call, target)
        default = {axis: values[0] for axis, values in space.items()}
        for number, config in enumerate(_combinations(default, {axis: space[axis] for axis in axes})):
            functions[f"{name}_{number}"] = family.build(call, target, config).with_attr("global_symbol", f"{name}_{number}")
            label = ", ".join(f"{axis} {config[axis]}" for axis in axes)
            cases.append({"function": f"{name}_{number}", "op": call.op, "shape": shape, "config": label})

    for name, (o, k) in LINEAR.items():
        add(f"gemm_{name}", gemm_hopper, gemm_hopper._call(o, k, residual=int(name in ("o", "down"))), (o, k), ("tile", "cluster"))
    for name, (hq, hk, d, page) in ATTEND.items():
        call = prefill_attention._call(hq, hk, d, page_size=page)
        add(f"attend_{name}", prefill_attention, call, (hq, hk, d, page), ("keys",))
    cuda_tools.prepare()
    with cuda.tvm_target(target) as tvm_target:
        module = tvm.compile(tvm.IRModule(functions), target=tvm_target, tir_pipeline=cuda.PIPELINE)
    folder.mkdir(parents=True, exist_ok=True)
    module.export_library(str(folder / "kernels.so"), fcompile=linker(target))
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")


def _combinations(default: dict[str, Any], axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    configs = [default]
    for axis, values in axes.items():
        configs = [{**config, axis: value} for config in configs for value in values]
    return configs


def load(path: Path) -> Any:
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    import torch  # noqa: F401  (first: brings the CUDA runtime library that TVM's links to)

    # isort: split
    import tvm
    import tvm_ffi

    if tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is None:
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
    return tvm.runtime.load_module(str(path))


def microseconds(calls: list[Callable[[], Any]], count: int = 48, repeats: int = 7) -> float:
    """Median time of one call among ``count`` in a CUDA graph, which go round ``calls``."""
    import torch
    import tvm_ffi

    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with tvm_ffi.use_torch_stream(torch.cuda.stream(side)):
        graph.capture_begin(capture_error_mode="thread_local")
        for i in range(count):
            calls[i % len(calls)]()
        graph.capture_end()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def linear_case(module: Any, case: dict[str, Any], n: int) -> tuple[float, int, list[Any], list[Any]]:
    """Relative error, operations, and calls of ours and of cuBLAS that take turns over copies of the operands."""
    import torch
    import tvm_ffi

    o, k = case["shape"]
    residual = case["function"].split("_")[1] in ("o", "down")
    copies = max(2, min(8, L2_BYTES // (2 * (n * k + o * k + n * o))))
    ours, theirs, error = [], [], 0.0
    for i in range(copies):
        x, w = torch.randn(n, k, device="cuda").bfloat16(), (torch.randn(o, k, device="cuda") / k**0.5).bfloat16()
        r, out = torch.randn(n, o, device="cuda").bfloat16(), torch.full((n, o), float("nan"), device="cuda").bfloat16()
        arguments = [tvm_ffi.from_dlpack(t) for t in ((x, w, r, out) if residual else (x, w, out))]
        ours.append(lambda a=arguments: module[case["function"]](*a))
        peer = (lambda x=x, w=w, r=r: torch.addmm(r, x, w.T)) if residual else (lambda x=x, w=w: torch.matmul(x, w.T))
        theirs.append(peer)
        if i == 0:
            ours[0]()
            expected = x.float() @ w.float().T + (r.float() if residual else 0)
            error = float((out.float() - expected).norm() / expected.norm())
    return error, 2 * n * o * k, ours, theirs


def attend_case(module: Any, case: dict[str, Any], batch: int, rows: int, length: int) -> tuple[float, int, list[Any], list[Any]]:
    import torch
    import tvm_ffi
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    hq, hk, d, page = case["shape"]
    m = -(-length // page)
    ours, theirs, error = [], [], 0.0
    for i in range(2):
        q = torch.randn(batch * rows, hq, d, device="cuda").bfloat16()
        k, v = (torch.randn(batch, m * page, hk, d, device="cuda").bfloat16() for _ in range(2))
        table = torch.randperm(batch * m, device="cuda").int().view(batch, m)
        pages = torch.empty(batch * m, hk, 2, page, d, device="cuda", dtype=torch.bfloat16)
        for part, tensor in enumerate((k, v)):
            pages[table.view(-1).long(), :, part] = tensor.view(batch * m, page, hk, d).transpose(1, 2)
        lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
        starts = torch.arange(0, batch * rows + 1, rows, device="cuda", dtype=torch.int32)
        out = torch.full_like(q, float("nan"))
        tensors = (q, pages.view(batch * m, hk, -1), table, lengths, starts, out)
        arguments = [tvm_ffi.from_dlpack(t) for t in tensors]
        ours.append(lambda a=arguments: module[case["function"]](*a))
        dense = [t.transpose(1, 2).contiguous() for t in (q.view(batch, rows, hq, d), k[:, :length], v[:, :length])]
        mask = {"is_causal": True} if rows == length else {"attn_mask": causal_lower_right(rows, length)}
        theirs.append(lambda a=dense, m=mask: sdpa(*a, enable_gqa=True, **m))
        if i == 0:
            ours[0]()
            expected = theirs[0]().transpose(1, 2).reshape(out.shape).float()
            error = float((out.float() - expected).norm() / expected.norm())
    return error, 4 * batch * hq * d * sum(range(length - rows + 1, length + 1)), ours, theirs


def run(folder: Path) -> int:
    module = load(folder / "kernels.so")
    wrong = 0
    print(f"{'case':34} {'configuration':32} {'error':>8} {'us':>8} {'TFLOP/s':>8} {'torch/ours':>10}")
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8")):
        linear = case["op"] == "llmc.linear"
        for sizes in [(n,) for n in LINEAR_ROWS] if linear else ATTEND_BATCHES:
            error, flops, ours, theirs = (linear_case if linear else attend_case)(module, case, *sizes)
            label = f"{case['function']} {'x'.join(map(str, sizes))}"
            if not error < TOLERANCE:
                wrong += 1
                print(f"{label:34} {case['config']:32} {error:8.1e}  WRONG", flush=True)
                continue
            time = microseconds(ours)
            ratio = microseconds(theirs) / time
            print(f"{label:34} {case['config']:32} {error:8.1e} {time:8.1f} {flops / time * 1e-6:8.1f} {ratio:10.2f}", flush=True)
    return wrong


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("build", "run"):
        print(__doc__)
        return 2
    folder = Path(sys.argv[2])
    if sys.argv[1] == "run":
        return 1 if run(folder) else 0
    build(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
