"""Speed of the CUDA decode kernels (``gemv``, ``decode_attention``) on a GPU, next to the machine's limit.

    python benchmarks/cuda_decode_kernels.py build DIR    with llmc and nvcc, no GPU: writes kernels.so and cases.json
    python benchmarks/cuda_decode_kernels.py run DIR      on an sm_90a GPU with torch and the TVM runtime (libtvm_runtime_cuda.so)

``run`` first checks every kernel against torch in float32, then times CUDA graphs over buffers rotated past the L2 cache. The
table's last column is the share of the copy bandwidth measured in the same run (bytes read + written).
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

LINEAR = ("square_4096", "up_14336x4096", "down_4096x14336_residual")
LINEAR_CONFIGS: list[dict[str, Any]] = [
    {"warps": w, "depth": d, "tiles": t, "columns": c}
    for w, d, t, c in [(8, 4, 1, 8), (4, 4, 1, 8), (8, 2, 2, 8), (8, 4, 1, 16), (4, 4, 2, 16)]
]
ATTENTION_CONFIGS: list[dict[str, Any]] = [
    {"split": s, "warps": w, "least": m} for s, w, m in [(8, 4, 8), (8, 8, 8), (4, 4, 16), (2, 4, 16), (1, 4, 16)]
]
ROWS = (1, 8, 16)
CONTEXTS = ((1, 512), (1, 4096), (1, 32768), (32, 1024), (32, 4096))
HEADS, KV_HEADS, SIZE, PAGE = 32, 8, 128, 16
ROTATED_BYTES = 256 << 20


def build(folder: Path) -> None:
    """Compile every case with every configuration into one library."""
    import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

    # isort: split
    import tvm

    from llmc.schedules.cuda import decode_attention, gemv
    from llmc.targets import cuda, cuda_tools
    from llmc.targets.link import linker

    target = cuda.parse("cuda:sm_90a")
    attention = decode_attention._call(HEADS, KV_HEADS, SIZE, page_size=PAGE)
    wanted = [(gemv, name, gemv.SHAPES[name], c) for name, c in itertools.product(LINEAR, LINEAR_CONFIGS)]
    wanted += [(decode_attention, "attention", attention, c) for c in ATTENTION_CONFIGS]
    functions, cases = {}, []
    for i, (family, name, call, changed) in enumerate(wanted):
        config = {axis: values[0] for axis, values in family.space(call, target).items()} | changed
        symbol = f"kernel_{i}"
        functions[symbol] = family.build(call, target, config).with_attr("global_symbol", symbol)
        residual = bool(call.attr("residual"))
        cases.append({"symbol": symbol, "name": name, "config": changed, "weight": list(call.args[1].shape), "residual": residual})
    cuda_tools.prepare()
    with cuda.tvm_target(target) as tvm_target:
        module = tvm.compile(tvm.IRModule(functions), target=tvm_target, tir_pipeline=cuda.PIPELINE)
    folder.mkdir(parents=True, exist_ok=True)
    module.export_library(str(folder / "kernels.so"), fcompile=linker(target))
    (folder / "cases.json").write_text(json.dumps(cases, indent=1), encoding="utf-8")
    print(f"{len(cases)} kernels in {folder / 'kernels.so'}")


def run(folder: Path) -> None:
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    import torch
    import tvm
    import tvm.runtime
    import tvm_ffi

    if tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is None:
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
    torch.manual_seed(0)
    module = tvm.runtime.load_module(str(folder / "kernels.so"))
    limit = _copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {limit / 1e12:.2f} TB/s")
    rows: list[tuple[str, ...]] = []
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8")):
        kernel = module[case["symbol"]]
        config = " ".join(f"{k}={v}" for k, v in case["config"].items())
        inputs = _attention_inputs if case["name"] == "attention" else _linear_inputs
        for size in CONTEXTS if case["name"] == "attention" else ROWS:
            arrays, wanted, moved = inputs(case, size)
            sets = [[t.clone() for t in arrays] for _ in range(max(2, ROTATED_BYTES // moved))]
            views = [[tvm_ffi.from_dlpack(t) for t in tensors] for tensors in sets]
            kernel(*views[0])
            torch.cuda.synchronize()
            error = float((sets[0][-1].float() - wanted).abs().max() / wanted.abs().max())
            micros = _graph_time([partial(kernel, *v) for v in views])
            share = f"{moved / (micros * 1e-6) / limit:.0%}"
            verdict = "ok" if error < 1e-2 else "WRONG"
            rows.append((case["name"], str(size), config, f"{error:.1e} {verdict}", f"{micros:.2f}", share))
            del sets, views
    header = ("kernel", "rows or (batch, context)", "configuration", "error", "us", "of copy")
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _linear_inputs(case: dict[str, Any], n: int) -> tuple[list[Any], Any, int]:
    import torch

    o, k = case["weight"]
    x, weight = torch.randn(n, k, device="cuda").bfloat16(), (torch.randn(o, k, device="cuda") / k**0.5).bfloat16()
    extra = [torch.randn(n, o, device="cuda").bfloat16()] if case["residual"] else []
    wanted = x.float() @ weight.float().T + sum(e.float() for e in extra)
    arrays = [x, weight, *extra, torch.full((n, o), float("nan"), device="cuda").bfloat16()]
    return arrays, wanted, sum(a.numel() * a.element_size() for a in arrays)


def _attention_inputs(case: dict[str, Any], size: tuple[int, int]) -> tuple[list[Any], Any, int]:
    import torch

    batch, context = size
    blocks = -(-context // PAGE)
    pages = torch.randn(batch * blocks, KV_HEADS, PAGE * 2 * SIZE, device="cuda").bfloat16()
    table = torch.randperm(batch * blocks, device="cuda").reshape(batch, blocks).int()
    lengths = torch.full((batch,), context, device="cuda").int()
    q = torch.randn(batch, HEADS, SIZE, device="cuda").bfloat16()
    wanted = torch.empty(batch, HEADS, SIZE, device="cuda")
    for s in range(batch):
        kv = pages[table[s].long()].float().reshape(blocks, KV_HEADS, 2, PAGE, SIZE)
        k, v = (kv[:, :, i].permute(1, 0, 2, 3).reshape(KV_HEADS, -1, SIZE)[:, :context] for i in (0, 1))
        heads = q[s].float().reshape(KV_HEADS, -1, SIZE)
        wanted[s] = (torch.softmax(heads @ k.transpose(1, 2) * SIZE**-0.5, -1) @ v).reshape(HEADS, SIZE)
    out = torch.full((batch, HEADS, SIZE), float("nan"), device="cuda").bfloat16()
    starts = torch.arange(batch + 1, device="cuda").int()
    moved = batch * context * KV_HEADS * 2 * SIZE * 2 + 2 * q.numel() * 2
    return [q, pages, table, lengths, starts, out], wanted, moved


def _graph_time(calls: list[Callable[[], Any]], repetitions: int = 9) -> float:
    """Microseconds of one call: the median over replays of a CUDA graph that runs all of ``calls`` twice."""
    import torch
    import tvm_ffi

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with tvm_ffi.use_torch_stream(torch.cuda.stream(torch.cuda.Stream())):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls * 2:
                call()
        finally:
            graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (2 * len(calls)))
    return statistics.median(times)


def _copy_bandwidth() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GiB."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    destination = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        destination.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.numel() / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    (build if options.action == "build" else run)(options.folder)


if __name__ == "__main__":
    main()
