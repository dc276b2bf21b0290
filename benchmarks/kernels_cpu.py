"""Speed of the CPU kernels beside this machine's measured limits and beside torch, in one run.

    python benchmarks/kernels_cpu.py [linear] [quantized] [attend]

Prints for every case the time, GB/s and GFLOP/s, and the time as a percentage of the roofline: the larger of bytes / read
bandwidth and operations / multiply-add peak, both measured here first, on all threads. Threads: ``TVM_NUM_THREADS``, else one
for each processor (TVM by itself starts half as many).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))

# isort: split
import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import torch
import tvm
from tvm.tirx.script import builder as T

from llmc import targets
from llmc.passes.quantize.scheme import scheme
from llmc.schedules.cpu import attend, layout_panel, linear, quantized_linear
from llmc.schedules.cpu.emit import Simd, Symbols, arguments, bind, function, i64, local, read, store
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets import cpu

HOST = targets.parse("cpu")
THREADS = int(os.environ["TVM_NUM_THREADS"])
FMA_STEPS = 200_000


def best(run: Callable[[], Any], seconds: float = 0.4) -> float:
    """The shortest time of one call, over at least three calls and ``seconds``."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def compiled(function_: Any) -> Any:
    return cpu.build_kernels(tvm.IRModule({"main": function_.with_attr("global_symbol", "main")}), HOST)["main"]


def fma_peak() -> float:
    """FLOP/s of independent multiply-adds in registers, on all threads."""
    simd, symbols = Simd(HOST), Symbols()
    count = simd.registers * 3 // 4
    with function("peak") as done:
        (out,) = arguments(symbols, out=TensorSpec((THREADS, count, simd.lanes), "float32"))
        with T.parallel(0, THREADS) as t:
            registers = [local(simd.lanes) for _ in range(count)]
            for i, r in enumerate(registers):
                store(r, read(out, i64(t), i, 0, lanes=simd.lanes), 0, lanes=simd.lanes)
            with T.serial(0, FMA_STEPS):
                for r in registers:
                    value = read(r, 0, lanes=simd.lanes)
                    store(r, simd.fma(value, simd.splat(0.999, simd.lanes), value), 0, lanes=simd.lanes)
            for i, r in enumerate(registers):
                store(out, read(r, 0, lanes=simd.lanes), i64(t), i, 0, lanes=simd.lanes)
    run, out_tensor = compiled(done()), tvm.runtime.tensor(np.zeros((THREADS, count, simd.lanes), np.float32))
    return 2 * THREADS * count * simd.lanes * FMA_STEPS / best(lambda: run(out_tensor))


def read_bandwidth() -> float:
    """Bytes per second of summing 256 MiB on all threads."""
    simd, symbols, rows, width = Simd(HOST), Symbols(), 4096, 16384
    streams = 8
    with function("bandwidth") as done:
        x, out = arguments(symbols, x=TensorSpec((rows, width), "float32"), out=TensorSpec((rows, simd.lanes), "float32"))
        with T.parallel(0, rows) as r:
            row, sums = bind(i64(r)), [local(simd.lanes) for _ in range(streams)]
            for s in sums:
                store(s, simd.splat(0.0, simd.lanes), 0, lanes=simd.lanes)
            with T.serial(0, width // (simd.lanes * streams)) as i:
                for j, s in enumerate(sums):
                    value = read(x, row, (i64(i) * streams + j) * simd.lanes, lanes=simd.lanes)
                    store(s, read(s, 0, lanes=simd.lanes) + value, 0, lanes=simd.lanes)
            total = read(sums[0], 0, lanes=simd.lanes)
            for s in sums[1:]:
                total = bind(total + read(s, 0, lanes=simd.lanes))
            store(out, total, row, i64(0), lanes=simd.lanes)
    data = tvm.runtime.tensor(np.ones((rows, width), np.float32))
    run, result = compiled(done()), tvm.runtime.empty((rows, simd.lanes), "float32")
    return rows * width * 4 / best(lambda: run(data, result))


def report(name: str, seconds: float, moved: int, flops: int, limits: tuple[float, float], peer: float) -> None:
    ideal = max(moved / limits[0], flops / limits[1])
    print(
        f"{name:44} {seconds * 1e6:10.1f} us {moved / seconds / 1e9:8.1f} GB/s {flops / seconds / 1e9:8.1f} GFLOP/s "
        f"{100 * ideal / seconds:6.1f} % of roofline   torch {peer * 1e6:10.1f} us ({peer / seconds:.2f}x)",
        flush=True,
    )


def kernel(family: Any, call: KernelCall) -> Any:
    config = {axis: values[0] for axis, values in family.space(call, HOST).items()}
    return compiled(family.build(call, HOST, config))


def filled(spec: TensorSpec, symbols: dict[str, int], rng: np.random.Generator) -> Any:
    result = tvm.runtime.empty(spec.bind(symbols), spec.dtype)
    result.copyfrom(rng.standard_normal(spec.bind(symbols), dtype=np.float32).astype(result.numpy().dtype))
    return result


def bench_linear(limits: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    for o, k in ((960, 576), (3072, 576), (576, 1536), (49152, 576), (4096, 4096)):
        for dtype in ("float32", "bfloat16"):
            call = KernelCall(
                linear.OP, (TensorSpec(("n", k), "float32"), TensorSpec((o, k), dtype)), TensorSpec(("n", o), "float32"),
                (("activation", "none"), ("bias", 0), ("residual", 0)),
            )  # fmt: skip
            run = kernel(linear, call)
            for n in (1, 4, 512):
                x, w, out = (filled(s, {"n": n}, rng) for s in (*call.args, call.result))
                tx, tw = torch.from_dlpack(x), torch.from_dlpack(w)
                tx = tx.to(tw.dtype)
                peer = best(partial(torch.nn.functional.linear, tx, tw))
                moved, flops = linear.roofline(call, n=n)
                report(f"linear {o}x{k} {dtype} n={n}", best(partial(run, x, w, out)), moved, flops, limits, peer)


def bench_quantized(limits: tuple[float, float]) -> None:
    """Beside torch in float32. Several copies of a matrix take turns, so that none stays in a cache."""
    rng = np.random.default_rng(0)
    for name in ("q4_1", "int4_g32", "int4_g128", "q8_0", "int8"):
        for o, k in ((960, 576), (3072, 576), (576, 1536), (4096, 4096)):
            part = layout_panel.parts(scheme(name), o, k)["panels"]
            attrs = {"activation": "none", "bias": 0, "residual": 0, "scheme": name, "layout": layout_panel.NAME, "o": o, "k": k}
            specs = (TensorSpec(("n", k), "float32"), part)
            call = KernelCall(quantized_linear.OP, specs, TensorSpec(("n", o), "float32"), tuple(sorted(attrs.items())))
            run, size = kernel(quantized_linear, call), int(np.prod(part.bind({})))
            weights = []
            for _ in range(max(1, (128 << 20) // size)):
                # bytes below 60 are small finite numbers as halves of a scale
                weights.append(tvm.runtime.tensor(rng.integers(0, 60, part.bind({}), np.uint8)))
            for n in (1, 4, 512):
                x, out, turn = filled(specs[0], {"n": n}, rng), filled(call.result, {"n": n}, rng), iter(range(1 << 40))
                tx, tw = torch.from_dlpack(x), torch.randn(o, k)
                peer = best(partial(torch.nn.functional.linear, tx, tw))

                def step(run: Any = run, x: Any = x, out: Any = out, turn: Any = turn, weights: Any = weights) -> None:
                    run(x, weights[next(turn) % len(weights)], out)

                moved, flops = quantized_linear.roofline(call, n=n)
                report(f"quantized {o}x{k} {name} n={n}", best(step), moved, flops, limits, peer)


def bench_attend(limits: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    for phase, hq, hk, d, rows, context in (
        ("decode", 9, 3, 64, 1, 2048),
        ("decode", 32, 8, 128, 1, 4096),
        ("extend", 9, 3, 64, 512, 512),
        ("extend", 32, 8, 128, 256, 2048),
        ("extend", 8, 8, 64, 512, 512),
    ):
        page_size, pages = 16, context // 16
        attrs = {"scale": d**-0.5, "window": -1, "chunk": -1, "softcap": 0.0, "sinks": 0, "page_size": page_size, "v_dim": d}
        specs = (
            TensorSpec(("n", hq, d), "float32"), TensorSpec(("num_pages", hk, page_size * 2 * d), "float32"),
            TensorSpec(("b", "m"), "int32"), TensorSpec(("b",), "int32"), TensorSpec(("b+1",), "int32"),
        )  # fmt: skip
        call = KernelCall(attend.OP, specs, TensorSpec(("n", hq, d), "float32"), tuple(sorted(attrs.items())), phase)
        symbols = {"n": rows, "num_pages": pages}
        q, kv, out = filled(specs[0], symbols, rng), filled(specs[1], symbols, rng), filled(call.result, symbols, rng)
        table, lengths, starts = (
            tvm.runtime.tensor(np.array(v, np.int32)) for v in ([rng.permutation(pages)], [context], [0, rows])
        )
        run = kernel(attend, call)
        seconds = best(partial(run, q, kv, table, lengths, starts, out))
        shape = (1, hk, context, d)
        tq = torch.randn(1, hq, rows, d)
        tk, tv = torch.randn(shape), torch.randn(shape)
        mask = torch.ones(rows, context, dtype=torch.bool).tril(context - rows)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        peer = best(partial(sdpa, tq, tk, tv, attn_mask=mask, enable_gqa=True))
        moved, _ = attend.roofline(call, n=rows, b=1, context=context)
        flops = 4 * hq * d * sum(context - rows + r + 1 for r in range(rows))
        report(f"attend {phase} {hq}x{hk}x{d} rows={rows} context={context}", seconds, moved, flops, limits, peer)


def main() -> None:
    wanted = sys.argv[1:] or ["linear", "quantized", "attend"]
    torch.set_num_threads(THREADS)
    limits = (read_bandwidth(), fma_peak())
    print(f"{HOST.name}, {THREADS} threads: read {limits[0] / 1e9:.1f} GB/s, multiply-add {limits[1] / 1e9:.1f} GFLOP/s")
    if "linear" in wanted:
        bench_linear(limits)
    if "quantized" in wanted:
        bench_quantized(limits)
    if "attend" in wanted:
        bench_attend(limits)


if __name__ == "__main__":
    main()
