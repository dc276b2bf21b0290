"""``llmc.linear`` on sm_90a: every kernel family and candidate configuration at the sizes of an 8B model, next to cuBLAS.

    python benchmarks/cuda_linear.py build DIR [--only gemv,split,...]    with llmc and nvcc, no GPU: kernels.so and cases.json
    python benchmarks/cuda_linear.py run DIR                              on an sm_90a GPU with torch and the TVM runtime

``run`` checks every kernel against torch in float32, then times CUDA graphs over weights rotated past the L2 cache. For each
shape and number of rows it prints cuBLAS's time, the time of moving every operand once at the copy bandwidth measured in the
same run, and the configurations, the fastest first, each with its microseconds and cuBLAS's time over its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cuda_timing import copy_bandwidth, load, microseconds

SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "o": (4096, 4096, {"residual": 1}),
    "qkv": (6144, 4096, {}),
    "gate_up": (28672, 4096, {}),
    "gated": (28672, 4096, {"activation": "silu_gated"}),
    "down": (4096, 14336, {"residual": 1}),
}
"""Label -> outputs, k, attributes."""

GEMV = [
    {"warps": w, "depth": d, "tiles": t, "columns": c, "min_blocks": m}
    for w, d, t, c, m in [
        (4, 4, 1, 8, 0), (4, 8, 1, 8, 0), (8, 2, 1, 8, 0), (8, 4, 1, 8, 0), (8, 4, 1, 8, 3), (8, 8, 1, 8, 0), (16, 2, 1, 8, 0),
        (16, 4, 1, 8, 0), (16, 1, 1, 8, 0), (4, 4, 2, 8, 0), (8, 2, 2, 8, 0), (2, 8, 1, 8, 0), (4, 2, 4, 8, 0), (8, 1, 4, 8, 0),
        (8, 4, 1, 8, 1), (4, 4, 1, 8, 1), (16, 2, 2, 8, 0), (8, 4, 1, 16, 0), (4, 4, 1, 16, 0), (8, 2, 2, 16, 0), (16, 2, 1, 16, 0),
        (8, 2, 1, 16, 0), (4, 8, 1, 16, 0),
    ]
]  # fmt: skip
SPLIT = [
    {"tile": (128, rows, resident), "split": split, "share": share}
    for rows in (32, 64, 128, 256)
    for resident, split, share in [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 3, 1), (2, 1, 1), (2, 2, 1), (2, 4, 1)]
    if resident == 1 or rows < 256
]
HOPPER = [{"tile": (128, columns), "cluster": cluster} for columns in (256, 192, 128) for cluster in (1, 2)]
KINDS: dict[str, tuple[str, list[dict[str, Any]], tuple[int, ...]]] = {
    "gemv": ("gemv", GEMV, (1, 8, 16)),
    "split": ("gemm_split", SPLIT, (32, 64, 128, 256)),
    "hopper": ("gemm_hopper", HOPPER, (256, 512, 1024, 2048)),
    "linear": ("linear_hopper", [{}], (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)),
}
"""Label -> family, configurations, rows. Rows beyond what a tile is high, or a GEMV's ``columns``, are left out."""

L2_BYTES = 256 << 20
TOLERANCE = 8e-3


def build(folder: Path, only: list[str]) -> None:
    """Compile every case with every configuration into one library."""
    import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

    # isort: split
    import importlib

    import tvm

    from llmc.schedules.cuda import linear_call
    from llmc.targets import cuda, cuda_tools
    from llmc.targets.link import linker

    target = cuda.parse("cuda:sm_90a")
    functions: dict[str, Any] = {}
    cases: list[dict[str, Any]] = []
    for kind, (module_name, configs, rows) in KINDS.items():
        if only and kind not in only:
            continue
        family = importlib.import_module(f"llmc.schedules.cuda.{module_name}")
        for shape, (o, k, attrs) in SHAPES.items():
            call = linear_call.sample(o, k, **attrs)
            default = {axis: values[0] for axis, values in family.space(call, target).items()}
            for config in configs:
                if kind == "hopper" and attrs.get("activation") == "silu_gated" and config["tile"][1] == 192:
                    continue  # half of such a tile does not divide
                name = f"kernel_{len(cases)}"
                functions[name] = family.build(call, target, default | config).with_attr("global_symbol", name)
                label = kind + " " + ",".join(f"{axis[0]}{_text(value)}" for axis, value in config.items())
                high = config["tile"][1] if kind == "split" else config.get("columns", max(rows))
                fitting = [n for n in rows if n <= high]
                cases.append({"function": name, "shape": shape, "label": label, "rows": fitting})
    cuda_tools.prepare()
    with cuda.tvm_target(target) as tvm_target:
        module = tvm.compile(tvm.IRModule(functions), target=tvm_target, tir_pipeline=cuda.PIPELINE)
    folder.mkdir(parents=True, exist_ok=True)
    module.export_library(str(folder / "kernels.so"), fcompile=linker(target))
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    print(f"{len(cases)} kernels in {folder / 'kernels.so'}")


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def run(folder: Path) -> int:
    """Print the table; the number of wrong results."""
    module = load(folder / "kernels.so")
    import torch
    import tvm_ffi

    torch.manual_seed(0)
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    limit, wrong = copy_bandwidth(), 0
    print(f"{torch.cuda.get_device_name()}: copy {limit / 1e12:.2f} TB/s; 'us (cuBLAS / ours) configuration', fastest first")
    for shape in dict.fromkeys(c["shape"] for c in cases):
        o, k, attrs = SHAPES[shape]
        mine = [c for c in cases if c["shape"] == shape]
        weights = [(torch.randn(o, k, device="cuda") / k**0.5).bfloat16() for _ in range(max(2, L2_BYTES // (2 * o * k)))]
        for n in sorted({n for c in mine for n in c["rows"]}):
            x = torch.randn(n, k, device="cuda").bfloat16()
            residual = torch.randn(n, o, device="cuda").bfloat16()
            wanted = x.float() @ weights[0].float().T
            if attrs.get("residual"):
                wanted += residual.float()
                peers = [partial(torch.addmm, residual, x, w.T) for w in weights]
            else:
                peers = [partial(torch.matmul, x, w.T) for w in weights]
            if attrs.get("activation") == "silu_gated":
                wanted = torch.nn.functional.silu(wanted[:, : o // 2]) * wanted[:, o // 2 :]
            out = torch.empty(wanted.shape, device="cuda", dtype=torch.bfloat16)
            theirs = microseconds(peers)
            moved = 2 * (x.numel() + weights[0].numel() + out.numel() * (1 + attrs.get("residual", 0)))
            extra = [residual] if attrs.get("residual") else []
            results = []
            for case in (c for c in mine if n in c["rows"]):
                views = [[tvm_ffi.from_dlpack(t) for t in (x, w, *extra, out)] for w in weights]
                out.fill_(float("nan"))
                module[case["function"]](*views[0])
                error = float((out.float() - wanted).norm() / wanted.norm())
                if not error < TOLERANCE:
                    wrong += 1
                    print(f"WRONG {shape} n={n} {case['label']}: error {error:.1e}")
                    continue
                results.append((microseconds([partial(module[case["function"]], *v) for v in views]), case["label"]))
            results.sort()
            head = f"{shape} {o}x{k} n={n}: cuBLAS {theirs:.1f}, moving {moved / limit * 1e6:.1f}"
            print(head + "".join(f" | {t:.1f} ({theirs / t:.2f}) {label}" for t, label in results[:7]), flush=True)
            if results:
                print("      slowest " + " | ".join(f"{t:.1f} {label}" for t, label in results[-2:]))
        del weights
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="kinds of kernels to build, with commas between")
    options = parser.parse_args()
    if options.action == "run":
        return 1 if run(options.folder) else 0
    build(options.folder, [kind for kind in options.only.split(",") if kind])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
