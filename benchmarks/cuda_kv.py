"""Quantized KV pages on a GPU: the kernels that write and read them checked, and decode attention timed beside bfloat16 pages.

    python benchmarks/cuda_kv.py build FOLDER                      where llmc and nvcc are; needs no GPU
    PYTHONPATH=. python benchmarks/cuda_kv.py run FOLDER           where the GPU is; torch, tvm_ffi, TVM's runtime libraries

``build`` also stores random operands and what the NumPy reference makes of them: results have to be near, codes the same but for
ties. Timed are calls in a CUDA graph over pages that together do not fit the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cuda_timing import load, microseconds

HEADS, KV_HEADS, D, PAGE = 32, 8, 128, 16
SIZES = ((32, 4096), (32, 1024), (128, 2048), (8, 4096), (1, 32768))
"""Sequences and positions of each."""

CONFIGS: list[dict[str, Any]] = [{}, {"warps": 8}, {"warps": 4, "fill": 264, "min_blocks": 3}]
ROTATED_BYTES = 192 << 20
TOLERANCE = {"bfloat16": 1e-2, "uint8": 1e-3}


def build(folder: Path) -> None:
    import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

    # isort: split
    import numpy as np
    import tvm

    from llmc.kv_layout import SCHEMES
    from llmc.schedules.cuda import decode_attention
    from llmc.schedules.gpu import append, attend_decode, attend_extend, rope_append
    from llmc.schedules.gpu.attention_tile import make_call
    from llmc.targets import cuda, cuda_tools
    from llmc.targets.link import linker
    from tests.kernels_gpu.cases import arguments, operands

    target = cuda.parse("cuda:sm_90a")
    folder.mkdir(parents=True, exist_ok=True)
    functions, timed, checked = {}, [], []

    def add(family: Any, call: Any, symbol: str, config: dict[str, Any]) -> None:
        assert family.matches(call, target), symbol
        full = {axis: values[0] for axis, values in family.space(call, target).items()} | config
        functions[symbol] = family.build(call, target, full).with_attr("global_symbol", symbol)

    def check(family: Any, call: Any, symbol: str, arrays: list[Any], outputs: list[int]) -> None:
        wanted = family.reference(call, *arrays)
        wanted = [
            np.asarray(w, np.float32) if w.dtype != np.uint8 else w for w in (wanted if isinstance(wanted, tuple) else (wanted,))
        ]
        held = {f"a{i}": a.view(np.uint16) if a.dtype.itemsize == 2 else a for i, a in enumerate(arrays)}
        np.savez(folder / f"{symbol}.npz", **held, **{f"w{i}": w for i, w in zip(outputs, wanted, strict=True)})
        checked.append({"symbol": symbol, "outputs": outputs})

    for kv_dtype in ("bfloat16", *SCHEMES):
        call = make_call(HEADS, KV_HEADS, D, page_size=PAGE, kv_dtype=kv_dtype, phase="decode")
        fast = decode_attention.matches(call, target) is not None
        family = decode_attention if fast else attend_decode
        for i, config in enumerate(CONFIGS if fast else [{}]):
            add(family, call, f"decode_{kv_dtype}_{i}", config)
            timed.append({"symbol": f"decode_{kv_dtype}_{i}", "kv_dtype": kv_dtype, "bytes": _slot_bytes(call), "config": config})
        if kv_dtype not in SCHEMES:
            continue
        for name, other, case, outputs in (
            ("decode", family, call, [5]),
            ("extend", attend_extend, make_call(8, 2, D, page_size=PAGE, kv_dtype=kv_dtype), [5]),
            ("append", append, append._call(KV_HEADS, D, D, PAGE, kv_dtype=kv_dtype), [3]),
            ("rope", rope_append, rope_append.make_call(8, 2, D, page_size=PAGE, kv_dtype=kv_dtype, norm=1), [7, 4]),
        ):
            symbol = f"decode_{kv_dtype}_0" if name == "decode" else f"{name}_{kv_dtype}"
            if name != "decode":
                add(other, case, symbol, {})
            arrays, symbols = operands(attend_decode if name == "decode" else other, case, 7)
            check(other, case, symbol, arguments(other, case, arrays, symbols)[: len(case.args)], outputs)
    cuda_tools.prepare()
    with cuda.tvm_target(target) as tvm_target:
        module = tvm.compile(tvm.IRModule(functions), target=tvm_target, tir_pipeline=cuda.PIPELINE)
    module.export_library(str(folder / "kernels.so"), fcompile=linker(target))
    (folder / "cases.json").write_text(json.dumps({"timed": timed, "checked": checked}, indent=1), encoding="utf-8")
    print(f"{len(functions)} kernels in {folder / 'kernels.so'}, {(folder / 'kernels.so').stat().st_size >> 10} KiB")


def _slot_bytes(call: Any) -> int:
    from llmc.schedules.kv_pages import slot_bytes

    return slot_bytes(call, call.args[1], D, D)


def _check(module: Any, folder: Path, symbol: str, outputs: list[int]) -> float:
    """The largest error in units of its tolerance."""
    import numpy as np
    import torch
    import tvm_ffi

    stored = np.load(folder / f"{symbol}.npz")
    held = [torch.from_numpy(stored[f"a{i}"].copy()) for i in range(sum(n.startswith("a") for n in stored))]
    arrays = [(t.view(torch.bfloat16) if t.dtype == torch.uint16 else t).cuda() for t in held]
    for i in outputs:
        if i == len(arrays):
            arrays.append(torch.full(stored[f"w{i}"].shape, float("nan"), dtype=torch.bfloat16, device="cuda"))
    module[symbol](*(tvm_ffi.from_dlpack(a) for a in arrays))
    torch.cuda.synchronize()
    worst = 0.0
    for i in outputs:
        wanted, found = torch.from_numpy(stored[f"w{i}"]), arrays[i].cpu()
        if found.dtype == torch.uint8:
            worst = max(worst, float((found != wanted).float().mean()) / TOLERANCE["uint8"])
        else:
            worst = max(worst, float((found.float() - wanted).abs().max() / wanted.abs().max()) / TOLERANCE["bfloat16"])
    return worst


def _call(kernel: Any, kv_dtype: str, slot: int, batch: int, context: int) -> Any:
    """``kernel`` over pages of its own; codes and parameters are any that are numbers."""
    import torch
    import tvm_ffi

    blocks = -(-context // PAGE)
    width = slot * PAGE
    if kv_dtype == "bfloat16":
        pages = torch.randn(batch * blocks, KV_HEADS, width // 2, device="cuda").bfloat16()
    else:
        pages = torch.randint(0, 64, (batch * blocks, KV_HEADS, width), device="cuda", dtype=torch.uint8)
    table = torch.randperm(batch * blocks, device="cuda").int().reshape(batch, blocks)
    lengths = torch.full((batch,), context, device="cuda").int()
    starts = torch.arange(batch + 1, device="cuda").int()
    q = torch.randn(batch, HEADS, D, device="cuda").bfloat16()
    arguments = [tvm_ffi.from_dlpack(t) for t in (q, pages, table, lengths, starts, torch.empty_like(q))]
    return lambda: kernel(*arguments)


def run(folder: Path) -> int:
    module = load(folder / "kernels.so")
    import torch

    torch.manual_seed(0)
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    print(torch.cuda.get_device_name())
    wrong = 0
    for case in cases["checked"]:
        error = _check(module, folder, case["symbol"], case["outputs"])
        wrong += not error < 1
        print(f"{case['symbol']}: error {error:.2f} of what is allowed" + ("" if error < 1 else "  WRONG"), flush=True)
    for batch, context in SIZES:
        base, results = 0.0, []
        for case in cases["timed"]:
            moved = batch * context * KV_HEADS * case["bytes"]
            copies = max(1, min(8, -(-ROTATED_BYTES // moved)))
            kernel = module[case["symbol"]]
            time = microseconds([_call(kernel, case["kv_dtype"], case["bytes"], batch, context) for _ in range(copies)], 24)
            base = min(base or time, time) if case["kv_dtype"] == "bfloat16" else base
            config = " ".join(f"{k}={v}" for k, v in case["config"].items()) or "default"
            results.append(
                f"{case['kv_dtype']} {config}: {time:.1f} us, {moved / time * 1e-6:.2f} TB/s, {time / base:.2f} of bfloat16"
            )
        print(f"{batch} x {context}\n  " + "\n  ".join(results), flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.action == "run":
        return run(args.folder)
    build(args.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
