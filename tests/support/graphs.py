"""Flat graphs as an importer would emit them: norms, rope and activations as primitive Relax ops, with random weights.

One small decoder with switches covers the families; sizes are odd on purpose. ``Built.arguments`` gives the arrays for a
graph's parameters in the order of any later stage, reading merged weights from the parameter table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import TensorType, op

from llmc.dialect.attention import attention
from llmc.dialect.linear import linear
from llmc.dialect.moe import moe
from llmc.dialect.topk import topk
from llmc.importer.params import DTYPES, Constant, ParamTable


@dataclass(frozen=True)
class Config:
    """What the decoder is made of. ``norm``: rms, rms1 (stores weight - 1), layer. ``rope``: halves, pairs, none."""

    layers: int = 2
    hidden: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 6
    inner: int = 22
    vocab: int = 37
    norm: str = "rms"
    rope: str = "halves"
    rotary_dim: int = 0
    layout: str = "hnd"
    bias: bool = False
    activation: str = "silu"
    gated: bool = True
    qk_norm: bool = False
    sandwich: bool = False
    parallel: bool = False
    softcap: float = 0.0
    window: int = -1
    sinks: bool = False
    tied: bool = False
    experts: int = 0
    top_k: int = 2
    learned_positions: int = 0
    scale_embedding: float = 1.0
    storage: str = "float32"


CASES: dict[str, Config] = {
    "grouped": Config(),
    "nhd": Config(layout="nhd", qk_norm=True, tied=True, storage="float16"),
    "offset_norms": Config(
        norm="rms1", sandwich=True, softcap=20.0, window=5, activation="gelu_tanh", tied=True, scale_embedding=4.875,
    ),
    "parallel_partial": Config(norm="layer", rotary_dim=4, bias=True, parallel=True, gated=False, activation="gelu", kv_heads=4),
    "pairs": Config(rope="pairs", head_dim=10, heads=3, kv_heads=1, hidden=30, storage="bfloat16"),
    "pairs_partial": Config(rope="pairs", rotary_dim=6, head_dim=8, layout="nhd"),
    "learned": Config(rope="none", norm="layer", learned_positions=64, bias=True, gated=False, activation="gelu_tanh", kv_heads=4),
    "experts": Config(experts=5, sinks=True, storage="bfloat16"),
    "single": Config(layers=1, heads=1, kv_heads=1, head_dim=2, hidden=3, inner=5, vocab=7),
}  # fmt: skip


@dataclass
class Built:
    """A graph, its parameter table, and the config it came from."""

    module: tvm.IRModule
    table: ParamTable
    config: Config

    def arguments(self, params: Sequence[Any], given: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The arrays for ``params`` (Relax variables): those in ``given`` by name, the others from the table."""
        return [given[p.name] if p.name in given else stored(self.table, p.name) for p in params]

    def inputs(self, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
        ids = np.random.default_rng(seed).integers(0, self.config.vocab, tokens)
        return {"input_ids": ids.astype(np.int32), "positions": np.arange(tokens, dtype=np.int32)}


def stored(table: ParamTable, name: str) -> np.ndarray:
    """A parameter as the artifact would store it: in its storage dtype."""
    return table[name].source.read().astype(DTYPES[table[name].dtype])


class _Builder:
    """Emits one decoder."""

    def __init__(self, config: Config, seed: int) -> None:
        self.c = config
        self.rng = np.random.default_rng(seed)
        self.bb = relax.BlockBuilder()
        self.n = tirx.Var("n", "int64")
        self.table = ParamTable()
        self.vars: dict[str, relax.Var] = {}
        self.ids = relax.Var("input_ids", TensorType([self.n], "int32"))
        self.positions = relax.Var("positions", TensorType([self.n], "int32"))

    def e(self, expr: Any) -> Any:
        return self.bb.emit(expr)

    def f(self, value: float) -> Any:
        return relax.const(value, "float32")

    def param(self, name: str, *shape: int, around: float = 0.0, scale: float = 0.3, dtype: str = "float32") -> Any:
        if name not in self.vars:
            value = (around + scale * self.rng.standard_normal(shape)).astype(DTYPES[dtype])
            self.table.add(name, Constant(value, name), dtype)
            self.vars[name] = relax.Var(name, TensorType(list(shape), dtype))
        return self.vars[name]

    def linear(self, name: str, x: Any, k: int, o: int, bias: bool | None = None) -> Any:
        w = self.param(f"{name}.weight", o, k, dtype=self.c.storage)
        y = self.e(linear(x, w))
        if self.c.bias if bias is None else bias:
            y = self.e(op.add(y, self.param(f"{name}.bias", o)))
        return y

    def norm(self, name: str, x: Any, d: int) -> Any:
        if self.c.norm == "layer":
            w, b = self.param(f"{name}.weight", d, around=1.0), self.param(f"{name}.bias", d)
            return self.e(op.nn.layer_norm(x, w, b, axes=[-1], epsilon=1e-5))
        x = self.e(op.astype(x, "float32"))
        square = self.e(op.power(x, self.f(2.0)))
        mean = self.e(op.mean(square, axis=[-1], keepdims=True))
        scaled = self.e(op.multiply(x, self.e(op.rsqrt(self.e(op.add(mean, self.f(1e-6)))))))
        if self.c.norm == "rms1":
            w = self.e(op.add(self.f(1.0), self.param(f"{name}.weight", d)))
            return self.e(op.multiply(scaled, w))
        return self.e(op.multiply(self.param(f"{name}.weight", d, around=1.0), self.e(op.astype(scaled, "float32"))))

    def rotary(self) -> tuple[Any, Any]:
        """cos and sin [n, r], computed from the positions."""
        r = self.c.rotary_dim or self.c.head_dim
        table = self.param("inv_freq", r // 2, around=0.5, scale=0.1)
        at = self.e(op.reshape(self.e(op.astype(self.positions, "float32")), [self.n, 1]))
        angles = self.e(op.multiply(at, self.e(op.reshape(table, [1, r // 2]))))
        angles = self.e(op.repeat(angles, 2, axis=1) if self.c.rope == "pairs" else op.concat([angles, angles], axis=-1))
        return self.e(op.cos(angles)), self.e(op.sin(angles))

    def cut(self, x: Any, begin: int, end: int, step: int = 1) -> Any:
        return self.e(op.strided_slice(x, [-1], [begin], [end], [step]))

    def rope(self, x: Any, cos: Any, sin: Any) -> Any:
        """x in the config's layout, cos and sin [n, r]: ``x * cos + rotate(x) * sin`` in primitive ops."""
        d, r = self.c.head_dim, self.c.rotary_dim or self.c.head_dim
        if self.c.layout == "nhd":
            cos, sin = (self.e(op.expand_dims(t, [1])) for t in (cos, sin))
        part = x if r == d else self.cut(x, 0, r)
        if self.c.rope == "pairs":
            negative = self.e(op.negative(self.cut(part, 1, r, 2)))
            pair = [self.e(op.expand_dims(t, [-1])) for t in (negative, self.cut(part, 0, r, 2))]
            stacked = self.e(op.concat(pair, axis=-1))
            turned = self.e(op.reshape(stacked, part.ty.shape))
        else:
            turned = self.e(op.concat([self.e(op.negative(self.cut(part, r // 2, r))), self.cut(part, 0, r // 2)], axis=-1))
        y = self.e(op.add(self.e(op.multiply(part, cos)), self.e(op.multiply(turned, sin))))
        return y if r == d else self.e(op.concat([y, self.cut(x, r, d)], axis=-1))

    def attention(self, prefix: str, x: Any, layer: int, rotary: tuple[Any, Any] | None) -> Any:
        c, n = self.c, self.n
        heads = {}
        for name, count in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
            y = self.linear(f"{prefix}.{name}_proj", x, c.hidden, count * c.head_dim)
            y = self.e(op.reshape(y, [n, count, c.head_dim]))
            if c.qk_norm and name != "v":
                y = self.norm(f"{prefix}.{name}_norm", y, c.head_dim)
            if c.layout == "hnd":
                y = self.e(op.permute_dims(y, [1, 0, 2]))
            if rotary is not None and name != "v":
                y = self.rope(y, *rotary)
            if c.layout == "hnd":
                y = self.e(op.permute_dims(y, [1, 0, 2]))
            heads[name] = y
        sinks = self.param(f"{prefix}.sinks", c.heads) if c.sinks else None
        window = c.window if layer % 2 == 0 else -1
        a = self.e(attention(
            heads["q"], heads["k"], heads["v"], sinks, scale=c.head_dim**-0.5, layer=layer, window=window, softcap=c.softcap,
        ))  # fmt: skip
        a = self.e(op.reshape(a, [n, c.heads * c.head_dim]))
        return self.linear(f"{prefix}.o_proj", a, c.heads * c.head_dim, c.hidden)

    def activate(self, x: Any) -> Any:
        return self.e(getattr(op.nn, self.c.activation)(x))

    def mlp(self, prefix: str, x: Any) -> Any:
        c = self.c
        if c.experts:
            return self.moe(prefix, x)
        up = self.linear(f"{prefix}.up_proj", x, c.hidden, c.inner)
        if c.gated:
            gate = self.linear(f"{prefix}.gate_proj", x, c.hidden, c.inner)
            hidden = self.e(op.multiply(self.activate(gate), up))
        else:
            hidden = self.activate(up)
        return self.linear(f"{prefix}.down_proj", hidden, c.inner, c.hidden)

    def moe(self, prefix: str, x: Any) -> Any:
        c = self.c
        scores = self.e(op.nn.softmax(self.linear(f"{prefix}.router", x, c.hidden, c.experts, bias=False), axis=-1))
        ids = self.e(topk(scores, c.top_k))
        weights = self.e(op.gather_elements(scores, ids, axis=1))
        weights = self.e(op.divide(weights, self.e(op.sum(weights, axis=[-1], keepdims=True))))
        gate_up = self.param(f"{prefix}.gate_up", c.experts, 2 * c.inner, c.hidden, dtype=c.storage)
        down = self.param(f"{prefix}.down", c.experts, c.hidden, c.inner, dtype=c.storage)
        return self.e(moe(x, ids, weights, gate_up, down, top_k=c.top_k, activation=c.activation))

    def layer(self, h: Any, i: int, rotary: tuple[Any, Any] | None) -> Any:
        c, prefix = self.c, f"layers.{i}"
        x = self.norm(f"{prefix}.norm1", h, c.hidden)
        a = self.attention(f"{prefix}.attn", x, i, rotary)
        if c.parallel:
            m = self.mlp(f"{prefix}.mlp", self.norm(f"{prefix}.norm2", h, c.hidden))
            return self.e(op.add(self.e(op.add(m, a)), h))
        if c.sandwich:
            a = self.norm(f"{prefix}.norm1b", a, c.hidden)
        h = self.e(op.add(h, a))
        m = self.mlp(f"{prefix}.mlp", self.norm(f"{prefix}.norm2", h, c.hidden))
        if c.sandwich:
            m = self.norm(f"{prefix}.norm2b", m, c.hidden)
        return self.e(op.add(h, m))

    def build(self) -> Built:
        c = self.c
        with self.bb.function("main", [self.ids, self.positions]):
            with self.bb.dataflow():
                table = self.param("embed", c.vocab, c.hidden, dtype=c.storage)
                h = self.e(op.astype(self.e(op.take(table, self.ids, axis=0)), "float32"))
                h = self.e(op.multiply(h, self.f(c.scale_embedding)))
                if c.learned_positions:
                    h = self.e(op.add(h, self.e(op.take(self.param("wpe", c.learned_positions, c.hidden), self.positions, axis=0))))
                rotary = None if c.rope == "none" else self.rotary()
                for i in range(c.layers):
                    h = self.layer(h, i, rotary)
                h = self.norm("norm", h, c.hidden)
                w = table if c.tied else self.param("lm_head.weight", c.vocab, c.hidden, dtype=c.storage)
                y = self.e(linear(h, w))
                if c.softcap:
                    y = self.e(op.tanh(self.e(op.divide(y, self.f(c.softcap)))))
                    y = self.e(op.multiply(y, self.f(c.softcap)))
                out = self.bb.emit_output(y)
            self.bb.emit_func_output(out)
        main = self.bb.get()["main"]
        main = relax.Function([self.ids, self.positions, *self.vars.values()], main.body, main.ret_ty, is_pure=True)
        attrs = {"global_symbol": "main", "num_input": 2}
        return Built(tvm.IRModule({"main": main.with_attrs(attrs)}), self.table, c)


def build(config: Config, seed: int = 0) -> Built:
    """The decoder of ``config`` with random weights."""
    return _Builder(config, seed).build()
