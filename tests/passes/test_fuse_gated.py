"""The product of an activated and another half of a linear layer's result becomes part of the layer, and only that."""

from __future__ import annotations

from typing import Any

import pytest
from tvm.relax import op

from llmc.dialect.core import attrs_of
from llmc.dialect.interpreter import OPS
from llmc.dialect.linear import linear, reference
from llmc.dialect.quantized import quantized_linear
from llmc.passes.fuse_gated import fuse_gated
from llmc.passes.merge_projections import merge_projections
from llmc.passes.shapes import dims, take_slice
from llmc.passes.widen import widen
from tests.passes.test_patterns import Case


def fuse(graph: Any) -> None:
    fuse_gated(graph, lambda *_: True)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_merged_gate_and_up(activation: str, swapped: bool, bias: bool) -> None:
    def body(c: Case, x: Any) -> Any:
        gate = c.e(linear(x, c.w("gate", 7, 6), c.w("gate_bias", 7) if bias else None))
        up = c.e(linear(x, c.w("up", 7, 6), c.w("up_bias", 7) if bias else None))
        factors = [c.e(getattr(op.nn, activation)(gate)), up]
        return op.multiply(*(factors[::-1] if swapped else factors))

    c = Case(body, 6)
    assert c.after(lambda g: merge_projections(g, c.table), fuse) == {"llmc.linear": 1}
    layer = c.graph.bindings[-1][1]
    assert attrs_of(layer)["activation"] == f"{activation}_gated"
    assert dims(layer.args[1])[0] == 14 and dims(c.graph.output)[1] == 7


def test_quantized_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def meaning(x: Any, codes: Any, scales: Any, *, activation: str, **_: Any) -> Any:
        return reference(x, codes * scales[:, None], activation=activation)

    def body(c: Case, x: Any) -> Any:
        y = c.e(quantized_linear(x, [c.w("codes", 14, 6), c.w("scales", 14)], scheme="int8", layout="any", o=14, k=6))
        return op.multiply(c.e(op.nn.silu(c.e(take_slice(y, 1, 0, 7)))), c.e(take_slice(y, 1, 7, 14)))

    monkeypatch.setitem(OPS, "llmc.quantized_linear", meaning)
    c = Case(body, 6)
    assert c.after(fuse) == {"llmc.quantized_linear": 1}
    attrs = attrs_of(c.graph.bindings[-1][1])
    assert (attrs["activation"], attrs["scheme"], dims(c.graph.output)[1]) == ("silu_gated", "int8", 7)


def test_casts_of_narrow_halves_go() -> None:
    def body(c: Case, x: Any) -> Any:
        y = c.e(linear(c.e(op.astype(x, "float16")), c.e(op.astype(c.w("w", 10, 6), "float16"))))
        gate, up = c.e(take_slice(y, 1, 0, 5)), c.e(take_slice(y, 1, 5, 10))
        return op.multiply(c.e(op.nn.silu(gate)), up)

    c = Case(body, 6)
    widen(c.graph)
    left = {value.op.name for _, value in c.graph.bindings[2:]}
    assert "relax.astype" in left, "the graph has casts before"
    fuse(c.graph)
    assert [value.op.name for _, value in c.graph.bindings[2:]] == ["llmc.linear"]


def test_what_is_left_alone() -> None:
    def halves(first: int, second: int, extra: bool = False, width: int = 10) -> Case:
        def body(c: Case, x: Any) -> Any:
            y = c.e(linear(x, c.w("w", width, 6)))
            gate, up = c.e(take_slice(y, 1, first, first + 5)), c.e(take_slice(y, 1, second, second + 5))
            product = c.e(op.multiply(c.e(op.nn.silu(gate)), up))
            return op.add(product, gate) if extra else product

        return Case(body, 6)

    for c in (halves(5, 0), halves(0, 0), halves(0, 5, extra=True), halves(0, 5, width=11), halves(0, 5, width=15)):
        assert c.after(fuse)["relax.multiply"] == 1
    c = halves(0, 5)
    assert c.after(lambda g: fuse_gated(g, lambda *_: False))["relax.multiply"] == 1
