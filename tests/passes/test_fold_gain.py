"""A norm's weight goes into the layers behind it if nothing else reads the norm or their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tvm.relax import op

from llmc.dialect.core import attrs_of
from llmc.dialect.linear import linear
from llmc.dialect.moe import moe
from llmc.dialect.norm import layer_norm, rms_norm
from llmc.importer.params import Constant
from llmc.passes.fold_gain import fold_gain
from llmc.passes.fuse_norm import is_ones
from tests.passes.test_patterns import Case


def normed(c: Case, x: Any, offset: float = 0.0) -> Any:
    """With weights whose products are exact in float32."""
    gain = c.w("gain", 6)
    c.table["gain"].source = Constant(np.array([-0.5, 1, 2, 0.25, -4, 0.125], np.float32) - np.float32(offset), "gain")
    return c.e(rms_norm(x, gain, 1e-3, offset))


def fold(c: Case) -> Any:
    return c.after(lambda graph: fold_gain(graph, c.table))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_layers_behind_a_norm_are_scaled(offset: float) -> None:
    def body(c: Case, x: Any) -> Any:
        h = normed(c, x, offset)
        q, v = c.e(linear(h, c.w("q", 6, 6), residual=x)), c.e(linear(h, c.w("v", 6, 6), c.w("bias", 6), activation="silu"))
        return linear(c.e(op.add(q, v)), c.w("o", 4, 6))

    c = Case(body, 6)
    q = c.table["q"].source.read()
    assert fold(c) == {"llmc.rms_norm": 1, "llmc.linear": 3, "relax.add": 1}
    norm = c.graph.bindings[0][1]
    assert is_ones(norm.args[1]) and attrs_of(norm) == {"eps": 1e-3, "offset": 0.0}
    assert "gain" not in c.table and "llmc.ones.6" in c.table
    assert np.array_equal(c.table["q"].source.read(), q * np.array([-0.5, 1, 2, 0.25, -4, 0.125], np.float32))


def test_norms_of_a_size_share_their_ones() -> None:
    def body(c: Case, x: Any) -> Any:
        h, ones = c.e(linear(normed(c, x), c.w("w", 6, 6))), c.w("llmc.ones.6", 6)
        c.table[ones.name].source = Constant(np.ones(6, np.float32), ones.name)
        return linear(c.e(rms_norm(h, ones, 1e-3)), c.w("v", 6, 6))

    c = Case(body, 6)
    fold(c)
    assert len({norm.args[1] for _, norm in c.graph.bindings if "eps" in attrs_of(norm)}) == 1


def test_products_are_rounded_once_to_what_is_stored() -> None:
    c = Case(lambda c, x: linear(normed(c, x), c.w("w", 6, 6)), 6)
    c.table["gain"].source = Constant(np.full(6, 1.1, np.float32), "gain")
    c.table["w"].dtype = "bfloat16"
    exact = c.table["w"].source.read() * np.float32(1.1)
    fold_gain(c.graph, c.table)
    found = c.table["w"].source.read()
    assert found.dtype == "bfloat16" and np.array_equal(found, exact.astype(found.dtype))


def _added(c: Case, x: Any) -> Any:
    h = normed(c, x)
    return op.add(c.e(linear(h, c.w("w", 6, 6))), h)


def _result(c: Case, x: Any) -> Any:
    h = normed(c, x)
    c.e(linear(h, c.w("w", 6, 6)))
    return h


def _experts(c: Case, x: Any) -> Any:
    h = normed(c, x)
    weights = c.e(op.nn.softmax(c.e(linear(h, c.w("router", 2, 6)))))
    ids = c.e(op.astype(c.e(op.zeros_like(weights)), "int32"))
    return moe(h, ids, weights, c.w("up", 2, 8, 6), c.w("down", 2, 6, 4), top_k=2, activation="silu")


def _tied(c: Case, x: Any) -> Any:
    """The weight is an embedding, too."""
    w = c.w("w", 6, 6)
    return op.add(c.e(linear(normed(c, x), w)), c.e(linear(x, w)))


def _layer_norm(c: Case, x: Any) -> Any:
    return linear(c.e(layer_norm(x, c.w("gain", 6), c.w("beta", 6), 1e-3)), c.w("w", 6, 6))


@pytest.mark.parametrize("body", [_added, _result, _experts, _tied, _layer_norm], ids=lambda f: f.__name__)
def test_what_is_left_alone(body: Callable[[Case, Any], Any]) -> None:
    c = Case(body, 6)
    fold(c)
    assert "gain" in c.table


def test_codes_of_a_checkpoint_are_left_alone() -> None:
    class Codes(Constant):
        quantization = "int8"

        def quantized(self) -> Any:
            raise AssertionError("nobody asks for them")

    c = Case(lambda c, x: linear(normed(c, x), c.w("w", 6, 6)), 6)
    held = c.table["w"].source
    c.table["w"].source = Codes(held.read(), "codes")
    fold(c)
    assert "gain" in c.table
