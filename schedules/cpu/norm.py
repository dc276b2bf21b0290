"""``llmc.rms_norm`` and ``llmc.layer_norm`` on a CPU: one pass for the statistics, one for the result, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import tirx

from llmc.schedules.cpu.emit import Simd, Symbols, arguments, bind, each_vector, f32, function, i64, local, parallel_if, read, store
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets.base import Target

Expr = Any
STORAGE = ("float32", "float16", "bfloat16")


def _rms(shape: tuple[int | str, ...], offset: float = 0.0, dtype: str = "float32") -> KernelCall:
    x = TensorSpec(shape, "float32")
    attrs = (("eps", 1e-5), ("offset", offset))
    return KernelCall("llmc.rms_norm", (x, TensorSpec(shape[-1:], dtype)), x, attrs)


def _layer(shape: tuple[int | str, ...], dtype: str = "float32") -> KernelCall:
    x, w = TensorSpec(shape, "float32"), TensorSpec(shape[-1:], dtype)
    return KernelCall("llmc.layer_norm", (x, w, w), x, (("eps", 1e-5),))


@dataclass(frozen=True)
class Norm:
    """The family of one of the two ops; they differ in the mean and the bias only."""

    NAME: str
    OP: str
    SHAPES: dict[str, KernelCall]
    centred: bool

    def matches(self, call: KernelCall, target: Target) -> str | None:
        x, *parameters = call.args
        if call.op != self.OP or target.kind != "cpu" or x.dtype != "float32" or not isinstance(x.shape[-1], int):
            return None
        if any(p.dtype not in STORAGE for p in parameters) or not all(isinstance(d, int) for d in x.shape[1:]):
            return None
        return "row by row, float32 statistics"

    def space(self, call: KernelCall, target: Target) -> dict[str, list[Any]]:
        return {}

    def build(self, call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
        simd, symbols = Simd(target), Symbols()
        x_spec, *parameter_specs = call.args
        d = int(x_spec.shape[-1])
        inner = prod(int(s) for s in x_spec.shape[1:-1])
        names = ["weight", "bias"][: len(parameter_specs)]
        specs = {"x": x_spec, **dict(zip(names, parameter_specs, strict=True)), "out": call.result}
        with function(f"{self.OP.removeprefix('llmc.')}_{d}") as done:
            buffers = dict(zip(specs, arguments(symbols, **specs), strict=True))
            rows = symbols.dim(x_spec.shape[0]) * inner

            def row(r: Expr) -> None:
                _row(simd, buffers, _index(i64(r), x_spec), d, call, self.centred)

            parallel_if(rows, d, row)
        return done()

    def reference(self, call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
        from llmc.dialect import norm

        f = norm.layer_norm_reference if self.centred else norm.rms_norm_reference
        return f(*arrays, **dict(call.attrs))

    def roofline(self, call: KernelCall, **symbols: int) -> tuple[int, int]:
        size = int(np.prod(call.args[0].bind(symbols)))
        return 2 * 4 * size, (8 if self.centred else 4) * size


def _index(row: Expr, x: TensorSpec) -> list[Expr]:
    """The index prefix of flattened row ``row``."""
    index: list[Expr] = []
    for dim in reversed(x.shape[1:-1]):
        index.insert(0, tirx.floormod(row, int(dim)))
        row = tirx.floordiv(row, int(dim))
    return [row, *index]


def _row(simd: Simd, buffers: dict[str, Expr], row: list[Expr], d: int, call: KernelCall, centred: bool) -> None:
    x = buffers["x"]
    lanes = simd.widest(d)

    def mean_of(term: Any) -> Expr:
        """The mean over the row of ``term(values, lanes)``, by a vector of partial sums and one for the tail."""
        tail = local(1)
        acc = local(lanes) if lanes > 1 else tail
        store(tail, f32(0.0), 0)
        if lanes > 1:
            store(acc, simd.splat(0.0, lanes), 0, lanes=lanes)

        def add(start: Expr, width: int) -> None:
            value = bind(simd.load(x, *row, start, lanes=width))
            if width == lanes:
                store(acc, term(value, read(acc, 0, lanes=width), width), 0, lanes=width)
            else:
                part = bind(term(value, simd.splat(0.0, width), width))
                store(tail, read(tail, 0) + simd.total(part), 0)

        each_vector(d, lanes, add)
        total = simd.total(read(acc, 0, lanes=lanes)) + read(tail, 0) if lanes > 1 else read(tail, 0)
        return bind(total * f32(1.0 / d))

    mean = mean_of(lambda v, acc, w: acc + v) if centred else f32(0.0)

    def square(value: Expr, acc: Expr, width: int) -> Expr:
        if centred:
            value = bind(value - simd.splat(mean, width))
        return simd.fma(value, value, acc)

    variance = mean_of(square)
    scale = bind(f32(1.0) / tirx.call_llvm_pure_intrin("float32", "llvm.sqrt", variance + f32(call.attr("eps"))))

    def write(start: Expr, width: int) -> None:
        value = simd.load(x, *row, start, lanes=width)
        weight = simd.load(buffers["weight"], start, lanes=width)
        if centred:
            value = (value - simd.splat(mean, width)) * simd.splat(scale, width)
            value = simd.fma(value, weight, simd.load(buffers["bias"], start, lanes=width))
        else:
            value = value * simd.splat(scale, width)
            value = value * (weight + simd.splat(call.attr("offset"), width)) if call.attr("offset") else value * weight
        store(buffers["out"], value, *row, start, lanes=width)

    each_vector(d, lanes, write)


rms_norm = Norm(
    NAME="cpu.rms_norm",
    OP="llmc.rms_norm",
    centred=False,
    SHAPES={
        "smollm2": _rms(("n", 576)),
        "odd_57": _rms(("n", 57), 1.0),
        "heads_20": _rms(("n", 3, 20), 0.0, "bfloat16"),
        "one": _rms(("n", 1), 0.0),
        "heads_128_f16": _rms(("n", 2, 128), 1.0, "float16"),
    },
)
layer_norm = Norm(
    NAME="cpu.layer_norm",
    OP="llmc.layer_norm",
    centred=True,
    SHAPES={"gpt": _layer(("n", 96)), "odd_57": _layer(("n", 57), "float16"), "heads_12": _layer(("n", 3, 12), "bfloat16")},
)
