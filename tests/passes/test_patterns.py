"""Each spelling of a pattern is found, what only looks like it is left alone, and the values stay the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest
from tvm import relax, tirx
from tvm.relax import TensorType, op

from llmc.dialect.interpreter import Interpreter
from llmc.dialect.linear import linear
from llmc.dialect.norm import rms_norm
from llmc.importer.params import Constant, ParamTable
from llmc.passes.fuse_epilogue import fuse_bias, fuse_epilogue
from llmc.passes.fuse_norm import fuse_norm
from llmc.passes.fuse_rope import fuse_rope
from llmc.passes.merge_projections import merge_projections, merged_name
from llmc.passes.rewrite import Graph, op_name
from llmc.passes.simplify import simplify
from llmc.passes.sink_permutes import sink_permutes
from llmc.passes.verify_dialect import Verifier
from tests.support.graphs import stored

N = 5


class Case:
    """A small graph over ``x [n, ...]`` and named weights: built by ``body(case, x)``, checked before and after a pass."""

    def __init__(self, body: Callable[[Case, Any], Any], *tail: int, seed: int = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.n = tirx.Var("n", "int64")
        self.table = ParamTable()
        self.bb = relax.BlockBuilder()
        self.vars: dict[str, relax.Var] = {}
        x = relax.Var("x", TensorType([self.n, *tail], "float32"))
        with self.bb.function("main", [x]):
            with self.bb.dataflow():
                out = self.bb.emit_output(self.e(body(self, x)))
            self.bb.emit_func_output(out)
        main = self.bb.get()["main"]
        main = relax.Function([x, *self.vars.values()], main.body, main.ret_ty).with_attr("num_input", 1)
        self.graph = Graph.of("main", main)
        self.x = self.rng.standard_normal((N, *tail))
        self.before = self.value()
        self.verifier = Verifier(self.table)

    def e(self, expr: Any) -> Any:
        return self.bb.emit(expr)

    def f(self, value: float) -> Any:
        return relax.const(value, "float32")

    def w(self, name: str, *shape: int) -> Any:
        if name not in self.vars:
            self.table.add(name, Constant(self.rng.standard_normal(shape).astype(np.float32), name))
            self.vars[name] = relax.Var(name, TensorType(list(shape), "float32"))
        return self.vars[name]

    def value(self) -> np.ndarray:
        given = [self.x if p.name == "x" else stored(self.table, p.name) for p in self.graph.params]
        return Interpreter(self.graph.function()).run(given)

    def after(self, *passes: Callable[[Graph], None]) -> Counter[str]:
        """Run ``passes``, compare the value with the one before, and count the operators that are left."""
        for run in passes:
            run(self.graph)
            self.graph.remove_unused_params(self.table)
            self.verifier.graph(getattr(run, "__name__", "pass"), self.graph)
        np.testing.assert_allclose(self.value(), self.before, rtol=1e-9, atol=1e-9)
        return Counter(op_name(value) for _, value in self.graph.bindings)

    def simplify(self, graph: Graph) -> None:
        simplify(graph, self.table)

    def norms(self, graph: Graph) -> None:
        fuse_norm(graph, self.table)

    def merge(self, graph: Graph) -> None:
        merge_projections(graph, self.table)


SQUARES: dict[str, Callable[[Case, Any], Any]] = {
    "power": lambda c, x: op.power(x, c.f(2.0)),
    "product": lambda c, x: op.multiply(x, x),
    "square": lambda c, x: op.square(x),
}
INVERSES: dict[str, Callable[[Case, Any, Any], Any]] = {
    "rsqrt": lambda c, x, v: op.multiply(x, c.e(op.rsqrt(v))),
    "rsqrt_left": lambda c, x, v: op.multiply(c.e(op.rsqrt(v)), x),
    "power": lambda c, x, v: op.multiply(x, c.e(op.power(v, c.f(-0.5)))),
    "one_over_sqrt": lambda c, x, v: op.multiply(x, c.e(op.divide(c.f(1.0), c.e(op.sqrt(v))))),
    "over_sqrt": lambda c, x, v: op.divide(x, c.e(op.sqrt(v))),
}
WEIGHTS: dict[str, Callable[[Case, Any], Any]] = {
    "left": lambda c, y: op.multiply(c.w("w", 6), y),
    "right": lambda c, y: op.multiply(y, c.w("w", 6)),
    "plus_one": lambda c, y: op.multiply(y, c.e(op.add(c.w("w", 6), c.f(1.0)))),
    "one_plus": lambda c, y: op.multiply(c.e(op.add(c.f(1.0), c.w("w", 6))), y),
    "none": lambda c, y: y,
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("square", SQUARES)
def test_every_spelling_of_rms_norm(square: str, inverse: str, weight: str) -> None:
    def body(c: Case, x: Any) -> Any:
        mean = c.e(op.mean(c.e(SQUARES[square](c, x)), axis=[-1], keepdims=True))
        total = c.e(op.add(c.f(1e-3), mean) if weight == "left" else op.add(mean, c.f(1e-3)))
        return WEIGHTS[weight](c, c.e(INVERSES[inverse](c, x, total)))

    c = Case(body, 3, 6)
    assert c.after(c.norms) == {"llmc.rms_norm": 1}
    (_, call), *_ = c.graph.bindings
    assert float(call.attrs["offset"]) == (1.0 if "plus" in weight else 0.0)
    assert set(c.table) == {"llmc.ones.6" if weight == "none" else "w"}


def _mean_square(c: Case, x: Any, axis: int = -1) -> Any:
    return c.e(op.add(c.e(op.mean(c.e(op.square(x)), axis=[axis], keepdims=True)), c.f(1e-3)))


def test_weight_multiplied_into_the_inverse_first() -> None:
    c = Case(lambda c, x: op.multiply(x, c.e(op.multiply(c.e(op.rsqrt(_mean_square(c, x))), c.w("w", 6)))), 6)
    assert c.after(c.norms) == {"llmc.rms_norm": 1}


@pytest.mark.parametrize("what", ["axis", "other", "cube"])
def test_what_is_no_rms_norm(what: str) -> None:
    def body(c: Case, x: Any) -> Any:
        if what == "axis":
            return op.multiply(x, c.e(op.rsqrt(_mean_square(c, x, axis=1))))
        if what == "other":
            return op.multiply(c.e(op.negative(x)), c.e(op.rsqrt(_mean_square(c, x))))
        cube = c.e(op.mean(c.e(op.abs(c.e(op.power(x, c.f(3.0))))), axis=[-1], keepdims=True))
        return op.multiply(x, c.e(op.rsqrt(c.e(op.add(cube, c.f(1e-3))))))

    c = Case(body, 4, 6)
    assert c.after(c.norms)["llmc.rms_norm"] == 0


def test_a_norm_read_twice_keeps_its_plain_value() -> None:
    def body(c: Case, x: Any) -> Any:
        y = c.e(op.multiply(x, c.e(op.rsqrt(_mean_square(c, x)))))
        return op.add(y, c.e(op.multiply(y, c.w("w", 6))))

    c = Case(body, 6)
    assert c.after(c.norms) == {"llmc.rms_norm": 1, "relax.multiply": 1, "relax.add": 1}


@pytest.mark.parametrize("affine", ["none", "weight", "both"])
def test_centred_norm_is_layer_norm(affine: str) -> None:
    def body(c: Case, x: Any) -> Any:
        y = c.e(op.subtract(x, c.e(op.mean(x, axis=[-1], keepdims=True))))
        y = c.e(op.multiply(y, c.e(op.rsqrt(_mean_square(c, y)))))
        y = y if affine == "none" else c.e(op.multiply(c.w("w", 6), y))
        return op.add(y, c.w("b", 6)) if affine == "both" else y

    c = Case(body, 6)
    assert c.after(c.norms) == {"llmc.layer_norm": 1}


def test_relax_norms() -> None:
    c = Case(lambda c, x: op.nn.rms_norm(c.e(op.nn.layer_norm(x, c.w("g", 6), c.w("b", 6), axes=[-1])), c.w("w", 6), axes=[-1]), 6)
    assert c.after(c.norms) == {"llmc.layer_norm": 1, "llmc.rms_norm": 1}


def _angles(c: Case, width: int) -> tuple[Any, Any]:
    """cos and sin [n, width] that differ from row to row and from column to column."""
    rows = c.e(op.reshape(c.e(op.astype(c.e(op.arange(0, c.n, 1, "int32")), "float32")), [c.n, 1]))
    angles = c.e(op.multiply(rows, c.e(op.reshape(c.w("freq", width), [1, width]))))
    return c.e(op.cos(angles)), c.e(op.sin(angles))


def _cut(c: Case, x: Any, *index: int) -> Any:
    return c.e(op.strided_slice(x, [-1], [index[0]], [index[1]], [*index[2:]] or [1]))


def test_rope_over_half_tables() -> None:
    def body(c: Case, x: Any) -> Any:
        cos, sin = (c.e(op.expand_dims(t, [1])) for t in _angles(c, 4))
        a, b = _cut(c, x, 0, 4), _cut(c, x, 4, 8)
        low = c.e(op.subtract(c.e(op.multiply(a, cos)), c.e(op.multiply(b, sin))))
        high = c.e(op.add(c.e(op.multiply(cos, b)), c.e(op.multiply(a, sin))))
        return op.concat([low, high], axis=-1)

    c = Case(body, 3, 8)
    found = c.after(c.simplify, fuse_rope, c.simplify)
    assert found["llmc.rope"] == 1 and found["relax.subtract"] == 0


def test_rope_without_a_head_axis() -> None:
    def body(c: Case, x: Any) -> Any:
        cos, sin = _angles(c, 6)
        turned = c.e(op.concat([c.e(op.negative(_cut(c, x, 3, 6))), _cut(c, x, 0, 3)], axis=-1))
        return op.add(c.e(op.multiply(sin, turned)), c.e(op.multiply(cos, x)))

    c = Case(body, 6)
    assert c.after(c.simplify, fuse_rope, c.simplify)["llmc.rope"] == 1


@pytest.mark.parametrize("what", ["sign", "halves", "shared_axis"])
def test_what_is_no_rope(what: str) -> None:
    def body(c: Case, x: Any) -> Any:
        cos, sin = _angles(c, 6)
        if what == "shared_axis":
            cos, sin = (c.e(op.broadcast_to(c.e(op.expand_dims(t, [1])), [c.n, 3, 6])) for t in (cos, sin))
        else:
            cos, sin = (c.e(op.expand_dims(t, [1])) for t in (cos, sin))
        low, high = _cut(c, x, 0, 3), _cut(c, x, 3, 6)
        if what == "sign":
            turned = c.e(op.concat([high, c.e(op.negative(low))], axis=-1))
        elif what == "halves":
            turned = c.e(op.concat([c.e(op.negative(_cut(c, x, 2, 6))), _cut(c, x, 0, 2)], axis=-1))
        else:
            turned = c.e(op.concat([c.e(op.negative(high)), low], axis=-1))
        return op.add(c.e(op.multiply(x, cos)), c.e(op.multiply(turned, sin)))

    c = Case(body, 3, 6)
    assert c.after(c.simplify, fuse_rope, c.simplify)["llmc.rope"] == 0


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_epilogue_of_a_linear(activation: str) -> None:
    def body(c: Case, x: Any) -> Any:
        y = c.e(op.add(c.w("b", 6), c.e(linear(x, c.w("w", 6, 6)))))
        return op.add(x, c.e(getattr(op.nn, activation)(y)))

    c = Case(body, 6)
    assert c.after(fuse_bias, fuse_epilogue) == {"llmc.linear": 1}


@pytest.mark.parametrize("spelling", ["power", "square", "product"])
def test_squared_relu(spelling: str) -> None:
    def body(c: Case, x: Any) -> Any:
        y = c.e(op.nn.relu(c.e(linear(x, c.w("w", 7, 6)))))
        return SQUARES[spelling](c, y)

    c = Case(body, 6)
    assert c.after(fuse_epilogue) == {"llmc.linear": 1}


def test_a_value_read_twice_stays_outside_the_epilogue() -> None:
    def body(c: Case, x: Any) -> Any:
        y = c.e(linear(x, c.w("w", 6, 6)))
        return op.multiply(c.e(op.nn.silu(y)), c.e(op.add(x, y)))

    c = Case(body, 6)
    assert c.after(fuse_bias, fuse_epilogue) == {"llmc.linear": 1, "relax.nn.silu": 1, "relax.add": 1, "relax.multiply": 1}


def test_merging_takes_only_what_it_may() -> None:
    def body(c: Case, x: Any) -> Any:
        tied = c.e(linear(x, c.w("tied", 4, 6)))
        parts = [c.e(linear(x, c.w(f"a.{i}.weight", i + 1, 6))) for i in range(3)]
        biased = [c.e(linear(x, c.w(f"b.{i}.weight", 2, 6), c.w(f"b.{i}.bias", 2))) for i in range(2)]
        again = c.e(op.take(c.w("tied", 4, 6), relax.const(np.array([0, 1]), "int32"), axis=1))
        return op.concat([tied, *parts, *biased, c.e(op.matmul(tied, again))], axis=-1)

    c = Case(body, 6)
    found = c.after(c.merge)
    assert found["llmc.linear"] == 3  # the tied one, three without bias, two with
    assert {"tied", "a.0+1+2.weight", "b.0+1.weight", "b.0+1.bias"} == set(c.table)


def test_merged_name() -> None:
    assert merged_name(["m.q.weight", "m.k.weight"]) == "m.q+k.weight"
    assert merged_name(["a.weight", "b.weight"]) == "a+b.weight"
    assert merged_name(["w.x", "w.x.y"]) == "w.x+x.y" or merged_name(["w.x", "w.x.y"]).startswith("w.")


def test_simplify_cancels_layouts_and_identities() -> None:
    def body(c: Case, x: Any) -> Any:
        y = c.e(op.permute_dims(c.e(op.reshape(c.e(op.reshape(x, [c.n, 12])), [c.n, 3, 4])), [1, 0, 2]))
        y = c.e(rms_norm(c.e(op.multiply(y, c.f(2.0))), c.w("w", 4), 1e-5))
        y = c.e(op.permute_dims(c.e(op.add(c.f(0.0), c.e(op.divide(c.e(op.astype(y, "float32")), c.f(1.0))))), [1, 0, 2]))
        both = [c.e(op.cos(y)), c.e(op.cos(y)), c.e(op.squeeze(c.e(op.expand_dims(y, [1])), [1]))]
        c.e(op.exp(y))
        return op.add(c.e(op.add(both[0], both[1])), both[2])

    c = Case(body, 3, 4)
    found = c.after(c.simplify, sink_permutes, c.simplify)
    assert found == {"relax.multiply": 1, "llmc.rms_norm": 1, "relax.cos": 1, "relax.add": 2}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_permutes_sink_below_slices(axis: int) -> None:
    def body(c: Case, x: Any) -> Any:
        y = c.e(op.permute_dims(x, [2, 0, 1]))  # [5, n, 4]
        y = c.e(op.strided_slice(y, [axis], [0 if axis == 1 else 1], [N if axis == 1 else 3]))
        return op.permute_dims(y, [1, 2, 0])

    c = Case(body, 4, 5)
    found = c.after(c.simplify, sink_permutes, c.simplify)
    assert found["relax.permute_dims"] == (2 if axis == 1 else 0)  # along n nothing is known to be in bounds


def test_slices_of_splits_compose() -> None:
    def body(c: Case, x: Any) -> Any:
        parts = c.e(op.split(x, [2, 9], axis=-1))
        middle = c.e(relax.TupleGetItem(parts, 1))
        return op.concat([_cut(c, middle, 1, 7, 2), c.e(relax.TupleGetItem(parts, 2))], axis=-1)

    c = Case(body, 11)
    assert c.after(c.simplify) == {"relax.strided_slice": 2, "relax.concat": 1}


def test_linear_reads_a_matrix() -> None:
    c = Case(lambda c, x: linear(x, c.w("w", 5, 4)), 3, 4)
    assert c.after(c.simplify) == {"relax.reshape": 2, "llmc.linear": 1}


def test_a_scalar_that_broadcasts_is_no_identity() -> None:
    c = Case(lambda c, x: op.add(c.e(op.reshape(c.w("w", 4), [1, 4])), c.f(0.0)), 4)
    assert c.after(c.simplify) == {"relax.reshape": 1}
    c = Case(lambda c, x: op.multiply(x, relax.const(np.ones((2, 1, 1)), "float32")), 4)
    assert c.after(c.simplify) == {"relax.multiply": 1}
