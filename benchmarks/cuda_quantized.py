"""``llmc.quantized_linear`` on sm_90a: formats, sizes of an 8B and a 1B model, configurations, next to the machine's limit.

    python benchmarks/cuda_quantized.py build DIR [--only decode,extend]    with llmc and nvcc, no GPU: kernels.so and cases.json
    python benchmarks/cuda_quantized.py run DIR                             on an sm_90a GPU with torch and the TVM runtime

``run`` checks every kernel against torch in float32 on the unpacked weights, then times CUDA graphs over weights rotated past
the L2 cache. A line is a format, a size and a number of rows: the time of moving every operand once at the copy bandwidth
measured in the same run, cuBLAS's time on bfloat16 weights, and the configurations, the fastest first, each with microseconds.
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

SIZES: dict[str, tuple[int, int, dict[str, int]]] = {
    "8b_o": (4096, 4096, {"residual": 1}),
    "8b_qkv": (6144, 4096, {}),
    "8b_gate_up": (28672, 4096, {}),
    "8b_down": (4096, 14336, {"residual": 1}),
    "1b_o": (2048, 2048, {"residual": 1}),
    "1b_gate_up": (16384, 2048, {}),
    "1b_down": (2048, 8192, {"residual": 1}),
}
"""Label -> outputs, k, attributes."""

FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "decode": {
        "int4_g128": ("8b_o", "8b_gate_up", "8b_down", "1b_gate_up"),
        "int8": ("8b_o", "8b_gate_up"),
        "fp8_e4m3": ("8b_gate_up",),
        "int4_g32": ("8b_gate_up",),
        "q4_1": ("8b_gate_up",),
    },
    "extend": {
        "int4_g128": ("8b_o", "8b_gate_up", "8b_down"),
        "int8": ("8b_gate_up",),
        "fp8_e4m3": ("8b_gate_up",),
    },
}
"""Phase -> scheme -> sizes it is measured at."""

NARROW = [
    {"warps": w, "tiles": t, "depth": d, "columns": c}
    for w, t, d, c in [
        (8, 1, 2, 8), (4, 1, 2, 8), (16, 1, 2, 8), (8, 1, 1, 8), (16, 1, 1, 8), (8, 2, 1, 8), (4, 2, 2, 8), (4, 1, 4, 8),
        (2, 1, 4, 8), (8, 1, 1, 16), (8, 2, 1, 16), (4, 2, 1, 16), (8, 4, 1, 16), (4, 4, 1, 16), (16, 2, 1, 16),
    ]
]  # fmt: skip
WIDE = [
    {"tile": tile, "split": split}
    for tile, splits in {
        (64, 16, 3): (2, 4), (64, 32, 3): (1, 2, 4), (64, 32, 2): (2,), (64, 64, 2): (1, 2, 4), (64, 128, 1): (1, 2),
        (128, 64, 1): (1, 2), (128, 128, 1): (1, 2), (64, 256, 1): (1,), (128, 256, 1): (1, 2),
    }.items()
    for split in splits
]  # fmt: skip
ROWS = {"decode": (1, 8, 16), "extend": (16, 32, 64, 128, 256, 512, 2048)}
ROTATED_BYTES = 256 << 20
TOLERANCE = {"decode": 8e-3, "extend": 1.2e-2}


def build(folder: Path, only: list[str]) -> None:
    """Compile every case with every configuration into one library."""
    import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

    # isort: split
    import tvm

    from llmc.passes.quantize.scheme import scheme
    from llmc.schedules.cuda import quantized_gemm, quantized_gemv
    from llmc.schedules.gpu.quantized_call import make, part_names, specs
    from llmc.targets import cuda, cuda_tools
    from llmc.targets.link import linker

    target = cuda.parse("cuda:sm_90a")
    families: dict[str, tuple[Any, list[dict[str, Any]]]] = {"decode": (quantized_gemv, NARROW), "extend": (quantized_gemm, WIDE)}
    functions, cases = {}, []
    for phase, (family, configs) in families.items():
        if phase not in only:
            continue
        for name, sizes in FORMATS[phase].items():
            for size in sizes:
                o, k, attrs = SIZES[size]
                call = make(o, k, name, phase=phase, **attrs)
                default = {axis: values[0] for axis, values in family.space(call, target).items()}
                for config in configs:
                    symbol = f"kernel_{len(cases)}"
                    functions[symbol] = family.build(call, target, default | config).with_attr("global_symbol", symbol)
                    how = scheme(name)
                    parts = [[p, specs(call)[p].shape, specs(call)[p].dtype] for p in part_names(call)]
                    cases.append({
                        "symbol": symbol, "phase": phase, "scheme": name, "kind": how.kind, "bits": how.bits, "offset": how.offset,
                        "size": size, "config": config, "parts": parts,
                    })  # fmt: skip
    cuda_tools.prepare()
    with cuda.tvm_target(target) as tvm_target:
        module = tvm.compile(tvm.IRModule(functions), target=tvm_target, tir_pipeline=cuda.PIPELINE)
    folder.mkdir(parents=True, exist_ok=True)
    module.export_library(str(folder / "kernels.so"), fcompile=linker(target))
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    print(f"{len(cases)} kernels in {folder / 'kernels.so'}")


def run(folder: Path) -> None:
    module = load(folder / "kernels.so")
    import torch
    import tvm_ffi

    torch.manual_seed(0)
    limit = copy_bandwidth()
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    print(f"{torch.cuda.get_device_name()}: copy {limit / 1e12:.2f} TB/s; warps.tiles.depth.columns, or outputs.rows.blocks.split")
    keys = dict.fromkeys((c["phase"], c["scheme"], c["size"]) for c in cases)
    for key in keys:
        some = [c for c in cases if (c["phase"], c["scheme"], c["size"]) == key]
        o, k, attrs = SIZES[key[2]]
        parts = _random_parts(some[0])
        weight = _unpack(some[0], parts, o, k)
        for n in ROWS[key[0]]:
            x, residual = torch.randn(n, k, device="cuda").bfloat16(), torch.randn(n, o, device="cuda").bfloat16()
            inputs = [residual] if attrs.get("residual") else []
            wanted = x.float() @ weight.T + sum(r.float() for r in inputs)
            out = torch.full((n, o), float("nan"), device="cuda").bfloat16()
            moved = sum(t.numel() * t.element_size() for t in (x, *parts, *inputs, out))
            copies = max(2, min(12, ROTATED_BYTES // moved))
            sets = [[tvm_ffi.from_dlpack(t) for t in (x, *(p.clone() for p in parts), *inputs, out)] for _ in range(copies)]
            peer_weights = [
                torch.randn(o, k, device="cuda").bfloat16() for _ in range(max(2, min(6, ROTATED_BYTES // (2 * o * k))))
            ]
            peer = microseconds([partial(torch.matmul, x, w.T) for w in peer_weights])
            del peer_weights
            results = []
            for case in some:
                if not _sensible(case["config"], n):
                    continue
                out.fill_(float("nan"))
                module[case["symbol"]](*sets[0])
                torch.cuda.synchronize()
                error = float((out.float() - wanted).norm() / wanted.norm())
                label = ".".join(".".join(map(str, v)) if isinstance(v, list) else str(v) for v in case["config"].values())
                if not error < TOLERANCE[key[0]]:
                    print(f"WRONG {key} n={n} {label}: {error:.1e}")
                    continue
                results.append((microseconds([partial(module[case["symbol"]], *s) for s in sets]), label))
            best = "  ".join(f"{label} {time:.1f}" for time, label in sorted(results)[:6])
            floor = moved / limit * 1e6
            share = f"{floor / min(results)[0]:.0%}" if results else "-"
            print(f"{key[1]:15} {key[2]:11} n={n:<5} floor {floor:6.1f} {share:>4} cuBLAS {peer:6.1f}  {best}", flush=True)


def _sensible(config: dict[str, Any], n: int) -> bool:
    """Whether a configuration is worth timing for ``n`` rows: neither far narrower nor far wider."""
    if "columns" in config:
        return n <= int(config["columns"])
    wide = config["tile"][1]
    return (wide <= max(32, 2 * n) and n <= 4 * wide) or (wide >= 128 and n >= 256)


def _random_parts(case: dict[str, Any]) -> list[Any]:
    """Codes of random bits (no NaN among fp8's), scales that make weights of about 1 / sqrt k."""
    import torch

    parts = []
    for name, shape, dtype in case["parts"]:
        if name == "codes":
            codes = torch.randint(-(2**31), 2**31, shape, device="cuda", dtype=torch.int64).to(torch.int32)
            parts.append(codes & (~0x40404040 if case["kind"] == "fp8_e4m3" else -1))
        elif name == "zeros":
            parts.append(torch.randint(0, 1 << case["bits"], shape, device="cuda", dtype=torch.uint8))
        else:
            parts.append((torch.rand(shape, device="cuda") * 0.01 + 0.005).to(getattr(torch, dtype)))
    return parts


def _unpack(case: dict[str, Any], parts: list[Any], o: int, k: int) -> Any:
    """The weight, float32 [o, k], from the parts of the layout ``gpu.mma`` (schedules/gpu/layout_mma.py)."""
    import torch

    named = {name: t for (name, _, _), t in zip(case["parts"], parts, strict=True)}
    raw = named["codes"].contiguous().view(torch.uint8)
    tiles, chunks = named["codes"].shape[:2]
    if case["bits"] <= 4:
        v = torch.stack([raw & 15, raw >> 4], -1).reshape(tiles, chunks, 8, 4, 2, 2, 2, 4).permute(0, 5, 2, 1, 4, 3, 7, 6)
    else:
        v = raw.reshape(tiles, chunks, 8, 4, 2, 2, 4)[..., [0, 2, 1, 3]].permute(0, 4, 2, 1, 3, 5, 6)
    codes = v.reshape(tiles * 16, -1)[:o, :k].contiguous()
    values = codes.view(torch.float8_e4m3fn).float() if case["kind"] == "fp8_e4m3" else codes.float()

    def spread(t: Any) -> Any:
        rows = t.float().permute(0, 4, 2, 1, 3).reshape(tiles * 16, -1)
        return rows.repeat_interleave(128 // t.shape[3], 1)[:o, :k]

    if case["kind"] == "int" and case["offset"] == "none":
        values -= 1 << (case["bits"] - 1)
    if "zeros" in named:
        values -= spread(named["zeros"])
    values *= named["scales"].float()[:o, None] if named["scales"].dim() == 1 else spread(named["scales"])
    return values + spread(named["minima"]) if "minima" in named else values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("build", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="decode", help="phases to build, comma separated")
    arguments = parser.parse_args()
    if arguments.step == "build":
        build(arguments.folder, arguments.only.split(","))
    else:
        run(arguments.folder)


if __name__ == "__main__":
    main()
