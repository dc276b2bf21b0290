"""The attention kernels of sm_90a on a GPU, checked and timed: decode as a share of bandwidth, prefill beside torch.

    python benchmarks/cuda_attention.py build FOLDER [--only decode]    where llmc and nvcc are; needs no GPU
    PYTHONPATH=. python benchmarks/cuda_attention.py run FOLDER         where the GPU is; torch, tvm_ffi, TVM's runtime libraries

Every result is compared with torch first. Calls are timed in a CUDA graph over buffers that together do not fit the L2 cache.
Decode prints microseconds and the share of the bandwidth of a copy; extend TFLOP/s and the time of scaled_dot_product_attention
on contiguous keys and values over ours (one call for equal lengths, one for each sequence otherwise).
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

HEADS: dict[str, tuple[int, int, int, int]] = {"d128": (32, 8, 128, 16), "d64": (32, 8, 64, 16), "d96": (32, 32, 96, 32)}
"""Query heads, KV heads, head size, page size."""

DECODE = {
    "d128": ((1, 512), (1, 4096), (1, 32768), (8, 512), (32, 256), (32, 4096), (64, 256), (128, 256), (128, 1024)),
    "d64": ((1, 200), (8, 200), (16, 200), (64, 200), (8, 4096)),
    "d96": ((1, 1024), (16, 1024)),
}
"""Sequences and positions of each."""

DECODE_CONFIGS: dict[str, list[dict[str, Any]]] = {
    "d128": [{}, {"least": 4}, {"least": 16}, {"many": 512}, {"many": 2048}, {"many": 1 << 20}],
    "d64": [{}, {"least": 4}, {"least": 2}, {"warps": 4}, {"many": 512}, {"many": 2048}],
    "d96": [{}, {"least": 4}, {"warps": 4}],
}
EXTEND_CONFIGS: list[dict[str, Any]] = [{}, {"short": [128, 128, 2], "long": [128, 128, 2]}]
EXTEND = {
    "d128": ([(2048, 2048)], [(8192, 8192)], [(512, 512)] * 16, [(128, 128)] * 64, [(512, 8192)],
             [(1, 1024)] * 63 + [(512, 512)], [(4, 2048)] * 32),
    "d64": ([(2048, 2048)], [(512, 512)] * 16, [(1, 1024)] * 63 + [(512, 512)]),
    "d96": ([(2048, 2048)],),
}  # fmt: skip
"""Rows and positions of each sequence."""

ROTATED_BYTES = 192 << 20
TOLERANCE = 1e-2


def build(folder: Path, only: str) -> None:
    import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

    # isort: split
    import tvm

    from llmc.schedules.cuda import decode_attention, prefill_attention
    from llmc.targets import cuda, cuda_tools
    from llmc.targets.link import linker

    target = cuda.parse("cuda:sm_90a")
    functions, cases = {}, []
    for name, (hq, hk, d, page_size) in HEADS.items():
        for phase, family, configs in (
            ("decode", decode_attention, DECODE_CONFIGS[name]),
            ("extend", prefill_attention, EXTEND_CONFIGS),
        ):
            call = family._call(hq, hk, d, page_size=page_size)
            if only not in ("", phase):
                continue
            if family.matches(call, target) is None:
                print(f"{family.NAME} does not take {name}")
                continue
            for i, config in enumerate(configs):
                full = {axis: values[0] for axis, values in family.space(call, target).items()} | config
                symbol = f"{phase}_{name}_{i}"
                functions[symbol] = family.build(call, target, full).with_attr("global_symbol", symbol)
                cases.append({"symbol": symbol, "phase": phase, "name": name, "config": config})
    cuda_tools.prepare()
    with cuda.tvm_target(target) as tvm_target:
        module = tvm.compile(tvm.IRModule(functions), target=tvm_target, tir_pipeline=cuda.PIPELINE)
    folder.mkdir(parents=True, exist_ok=True)
    module.export_library(str(folder / "kernels.so"), fcompile=linker(target))
    (folder / "cases.json").write_text(json.dumps(cases, indent=1), encoding="utf-8")
    print(f"{len(cases)} kernels in {folder / 'kernels.so'}, {(folder / 'kernels.so').stat().st_size >> 10} KiB")


class Problem:
    """One ragged step: ``sizes`` are the rows and positions of each sequence."""

    def __init__(self, name: str, sizes: list[tuple[int, int]]) -> None:
        import torch

        self.sizes = sizes
        hq, hk, d, page = HEADS[name]
        rows, lengths = [r for r, _ in sizes], [length for _, length in sizes]
        blocks = [-(-length // page) for length in lengths]
        order = torch.randperm(sum(blocks), device="cuda").int()
        table = torch.zeros(len(sizes), max(blocks), dtype=torch.int32, device="cuda")
        self.pages = torch.randn(sum(blocks), hk, 2, page, d, device="cuda").bfloat16()
        self.q = torch.randn(sum(rows), hq, d, device="cuda").bfloat16()
        self.out = torch.full_like(self.q, float("nan"))
        self.dense = []
        taken = row = 0
        for s, count in enumerate(blocks):
            own = order[taken : taken + count]
            table[s, :count] = own
            kv = self.pages[own.long()].transpose(0, 1).transpose(1, 2).reshape(hk, 2, count * page, d)[:, :, : lengths[s]]
            q = self.q[row : row + rows[s]].transpose(0, 1)[None]
            self.dense.append((q.contiguous(), kv[None, :, 0].contiguous(), kv[None, :, 1].contiguous()))
            taken, row = taken + count, row + rows[s]
        starts = torch.tensor([0, *rows], device="cuda").cumsum(0).int()
        self.state = [table, torch.tensor(lengths, device="cuda").int(), starts]
        self.moved = 2 * (sum(lengths) * hk * 2 * d + 2 * self.q.numel())
        self.flops = sum(4 * hq * d * sum(range(length - r + 1, length + 1)) for r, length in sizes)

    def call(self, kernel: Any) -> Any:
        """``kernel`` over this problem, and a copy of its pages."""
        import tvm_ffi

        pages = self.pages.clone().reshape(self.pages.shape[0], self.pages.shape[1], -1)
        arguments = [tvm_ffi.from_dlpack(t) for t in (self.q, pages, *self.state, self.out)]
        return lambda: kernel(*arguments)

    def torch_calls(self) -> list[Any]:
        """The same by torch: one batched call if all sequences are alike."""
        import torch
        from torch.nn.attention.bias import causal_lower_right
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        alike = len(set(self.sizes)) == 1
        groups = [tuple(torch.cat(parts) for parts in zip(*self.dense, strict=True))] if alike else self.dense
        calls = []
        for (rows, length), (q, k, v) in zip(self.sizes, groups, strict=False):
            mask: dict[str, Any] = {"is_causal": True} if rows == length else {"attn_mask": causal_lower_right(rows, length)}
            mask = {} if rows == 1 else mask
            calls.append(lambda q=q, k=k, v=v, mask=mask: sdpa(q, k, v, enable_gqa=True, **mask))
        return calls

    def error(self, calls: list[Any]) -> float:
        """The error of ``out`` in units of the largest value."""
        import torch

        parts = [part for call in calls for part in call()]
        wanted = torch.cat([p.transpose(0, 1) for p in parts]).float()
        return float((self.out.float() - wanted).abs().max() / wanted.abs().max())


def _all(calls: list[Any]) -> None:
    for call in calls:
        call()


def run(folder: Path) -> int:
    module = load(folder / "kernels.so")
    import torch

    torch.manual_seed(0)
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s")
    wrong = 0
    for phase, table in (("decode", DECODE), ("extend", EXTEND)):
        for name, sizes in table.items():
            for size in sizes:
                kernels = [c for c in cases if (c["phase"], c["name"]) == (phase, name)]
                if not kernels:
                    continue
                problem = Problem(name, [(1, size[1])] * size[0] if phase == "decode" else size)
                peers = problem.torch_calls()
                label = f"{phase} {name} {len(problem.sizes)} x {problem.sizes[0]}"
                label += f" + {problem.sizes[-1]}" if problem.sizes[-1] != problem.sizes[0] else ""
                theirs = microseconds([partial(_all, peers)], 8) if phase == "extend" else 0.0
                results = []
                for case in kernels:
                    copies = max(1, min(8, -(-ROTATED_BYTES // problem.moved)))
                    calls = [problem.call(module[case["symbol"]]) for _ in range(copies)]
                    calls[0]()
                    error = problem.error(peers)
                    wrong += not error < TOLERANCE
                    time = microseconds(calls, 24)
                    what = f"{problem.moved / time * 1e6 / bandwidth:.0%}"
                    if phase == "extend":
                        what = f"{problem.flops / time * 1e-6:.0f} TFLOP/s, torch/ours {theirs / time:.2f}"
                    config = " ".join(f"{k}={v}" for k, v in case["config"].items()) or "default"
                    results.append(f"{config} {time:.1f} us {what}" + ("" if error < TOLERANCE else f" WRONG {error:.1e}"))
                print(f"{label}: " + " | ".join(results), flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=["decode", "extend", ""], default="")
    args = parser.parse_args()
    if args.action == "run":
        return run(args.folder)
    build(args.folder, args.only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
