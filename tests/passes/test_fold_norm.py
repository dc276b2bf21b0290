"""A norm becomes part of the linear layers behind it if nothing else reads it, and only in the decode phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm.relax import op

from llmc.dialect.core import attrs_of
from llmc.dialect.interpreter import OPS
from llmc.dialect.linear import linear, reference
from llmc.dialect.moe import moe
from llmc.dialect.norm import layer_norm, rms_norm
from llmc.dialect.quantized import quantized_linear
from llmc.importer.params import Constant
from llmc.passes.fold_norm import fold_norm
from llmc.passes.rewrite import op_name
from tests.passes.test_patterns import Case
from tests.support.pipelines import EVEN, OPTIONS, phases_after


def fold(graph: Any) -> None:
    fold_norm(graph, lambda *_: True)


def normed(c: Case, x: Any) -> Any:
    ones = c.w("llmc.ones.6", 6)
    c.table[ones.name].source = Constant(np.ones(6, np.float32), ones.name)
    return c.e(rms_norm(x, ones, 1e-3))


def test_every_layer_behind_a_norm_takes_it() -> None:
    def body(c: Case, x: Any) -> Any:
        h = normed(c, x)
        q, v = c.e(linear(h, c.w("q", 6, 6), residual=x)), c.e(linear(h, c.w("v", 6, 6), c.w("bias", 6), activation="silu"))
        return linear(c.e(op.add(q, v)), c.w("o", 4, 6))

    c = Case(body, 6)
    assert c.after(fold) == {"llmc.norm_linear": 2, "llmc.linear": 1, "relax.add": 1}
    attrs = attrs_of(c.graph.bindings[0][1])
    assert (attrs["eps"], attrs["residual"]) == (1e-3, 1)


def test_quantized_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def meaning(x: Any, codes: Any, scales: Any, *, activation: str, **_: Any) -> Any:
        return reference(x, codes * scales[:, None], activation=activation)

    def body(c: Case, x: Any) -> Any:
        h, parts = normed(c, x), [c.w("codes", 14, 6), c.w("scales", 14)]
        return quantized_linear(h, parts, scheme="int8", layout="any", o=14, k=6, activation="silu_gated")

    monkeypatch.setitem(OPS, "llmc.quantized_linear", meaning)
    c = Case(body, 6)
    assert c.after(fold) == {"llmc.norm_linear": 1}
    assert attrs_of(c.graph.bindings[-1][1])["scheme"] == "int8"


def _added(c: Case, x: Any) -> Any:
    h = normed(c, x)
    return op.add(c.e(linear(h, c.w("w", 6, 6))), h)


def _own_residual(c: Case, x: Any) -> Any:
    h = normed(c, x)
    return linear(h, c.w("w", 6, 6), residual=h)


def _result(c: Case, x: Any) -> Any:
    h = normed(c, x)
    c.e(linear(h, c.w("w", 6, 6)))
    return h


def _experts(c: Case, x: Any) -> Any:
    h = normed(c, x)
    weights = c.e(op.nn.softmax(c.e(linear(h, c.w("router", 2, 6)))))
    ids = c.e(op.astype(c.e(op.zeros_like(weights)), "int32"))
    return moe(h, ids, weights, c.w("up", 2, 8, 6), c.w("down", 2, 6, 4), top_k=2, activation="silu")


def _layer_norm(c: Case, x: Any) -> Any:
    return linear(c.e(layer_norm(x, c.w("gamma", 6), c.w("beta", 6), 1e-3)), c.w("w", 6, 6))


def _weighted(c: Case, x: Any) -> Any:
    return linear(c.e(rms_norm(x, c.w("gamma", 6), 1e-3)), c.w("w", 6, 6))


def _heads(c: Case, x: Any) -> Any:
    """The norm of a head, which no layer reads."""
    heads = c.e(rms_norm(c.e(op.reshape(x, (c.n, 2, 3))), c.w("head", 3), 1e-3))
    return linear(c.e(op.reshape(heads, (c.n, 6))), c.w("w", 6, 6))


@pytest.mark.parametrize(
    "body", [_added, _own_residual, _result, _experts, _layer_norm, _weighted, _heads], ids=lambda f: f.__name__
)
def test_what_is_left_alone(body: Callable[[Case, Any], Any]) -> None:
    c = Case(body, 6)
    assert "llmc.norm_linear" not in c.after(fold)


def test_all_layers_must_have_a_kernel() -> None:
    def body(c: Case, x: Any) -> Any:
        h = normed(c, x)
        return op.add(c.e(linear(h, c.w("w", 6, 6))), c.e(linear(h, c.w("v", 6, 6), activation="relu")))

    asked = []

    def takes(layer: Any, y: Any) -> bool:
        asked.append(op_name(layer))
        return bool(attrs_of(layer)["activation"] != "relu")

    c = Case(body, 6)
    assert "llmc.norm_linear" not in c.after(lambda g: fold_norm(g, takes))
    assert set(asked) == {"llmc.norm_linear"}


def test_a_models_decode_phase(tiny_model_dir: Callable[..., Path]) -> None:
    """Two layers; the norm before the logits stays, for 277 outputs no kernel of the family fits."""
    folder = tiny_model_dir("llama", intermediate_size=96, **EVEN)
    found = phases_after("fold_norm", folder)
    assert (found["decode"]["llmc.norm_linear"], found["decode"]["llmc.rms_norm"]) == (4, 1)
    assert (found["extend"]["llmc.norm_linear"], found["extend"]["llmc.rms_norm"]) == (0, 5)
    for plain in (
        phases_after("fold_norm", folder, replace(OPTIONS, unfused=frozenset({"norm"}))),
        phases_after("fold_norm", folder, target="cuda:sm_80"),
    ):
        assert plain["decode"]["llmc.rms_norm"] == 5


def test_norms_of_experts_stay(tiny_model_dir: Callable[..., Path]) -> None:
    found = phases_after("fold_norm", tiny_model_dir("mixtral", intermediate_size=96, **EVEN))["decode"]
    assert (found["llmc.norm_linear"], found["llmc.rms_norm"]) == (2, 3)
