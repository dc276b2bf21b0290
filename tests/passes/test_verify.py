"""The verifier finds what it promises to find, and says which pass and which binding."""

from __future__ import annotations

from collections.abc import Callable

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest
from tvm import relax
from tvm.relax import TensorType

from llmc.errors import InternalError
from llmc.importer.params import Constant
from llmc.passes.fuse_norm import fuse_norm
from llmc.passes.fuse_rope import fuse_rope
from llmc.passes.lower_kernels import kernel_call
from llmc.passes.rewrite import Graph, op_name
from llmc.passes.simplify import simplify
from llmc.passes.verify_dialect import Verifier
from tests.support import graphs


def _broken(change: Callable[[Graph, graphs.Built], None]) -> str:
    """The message for a graph that ``change`` has damaged."""
    built = graphs.build(graphs.CASES["grouped"])
    graph = Graph.of("main", built.module["main"])
    simplify(graph, built.table)
    fuse_norm(graph, built.table)
    fuse_rope(graph)
    simplify(graph, built.table)
    verifier = Verifier(built.table)
    verifier.graph("sound", graph)
    change(graph, built)
    with pytest.raises(InternalError) as caught:
        verifier.graph("bad_pass", graph)
    assert "bad_pass" in str(caught.value) and "main" in str(caught.value)
    return str(caught.value)


def _replace(graph: Graph, op: str, change: Callable[[relax.Call], relax.Call]) -> None:
    """Change the first call of ``op``, keeping the type of its result."""
    index = next(i for i, (_, value) in enumerate(graph.bindings) if op_name(value) == op)
    var, value = graph.bindings[index]
    new = change(value)
    graph.bindings[index] = (var, relax.Call(new.op, list(new.args), new.attrs, ret_ty=var.ty))


def _swap_operands(value: relax.Call) -> relax.Call:
    return relax.Call(value.op, [value.args[0], value.args[0], *list(value.args)[2:]], value.attrs)


def test_operands_of_a_dialect_op() -> None:
    message = _broken(lambda g, _: _replace(g, "llmc.linear", _swap_operands))
    assert "llmc.linear" in message and "its operands give" in message


def test_attributes_of_a_dialect_op() -> None:
    def change(graph: Graph, _: graphs.Built) -> None:
        _replace(graph, "llmc.rope", lambda v: relax.Call(v.op, list(v.args), {"rotary_dim": 7, "interleaved": 0}))

    assert "rotary_dim 7" in _broken(change)


def test_a_variable_read_before_it_is_bound() -> None:
    def change(graph: Graph, _: graphs.Built) -> None:
        graph.bindings = [*graph.bindings[1:], graph.bindings[0]]

    assert "not well formed" in _broken(change)


def test_a_weight_the_table_does_not_know() -> None:
    assert "norm.weight" in _broken(lambda _, b: b.table.remove("norm.weight"))


def test_a_weight_nobody_reads() -> None:
    def parameter(graph: Graph, _: graphs.Built) -> None:
        graph.params.append(relax.Var("embed.copy", TensorType([2], "float32")))

    def entry(_: Graph, built: graphs.Built) -> None:
        built.table.add("left.over", Constant(np.zeros(3, np.float32), "test"))

    assert "embed.copy" in _broken(parameter)
    assert "left.over" in _broken(entry)


def test_a_weight_of_another_shape() -> None:
    def change(_: Graph, built: graphs.Built) -> None:
        built.table.remove("norm.weight")
        built.table.add("norm.weight", Constant(np.zeros(3, np.float32), "test"))

    assert "norm.weight" in _broken(change)


def test_kernel_calls_of_equal_layers_are_equal() -> None:
    built = graphs.build(graphs.CASES["grouped"])
    graph = Graph.of("main", built.module["main"])
    calls = [kernel_call(value, var, "extend") for var, value in graph.bindings if op_name(value) == "llmc.linear"]
    assert len(calls) == 15 and len(set(calls)) == 5  # q = o, k = v, up = gate, down, vocabulary
    assert calls[0].args[0].shape == ("n", 24) and calls[0].attr("activation") == "none"
