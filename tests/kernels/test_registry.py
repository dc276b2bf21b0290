"""The choice of a kernel family."""

from __future__ import annotations

import dataclasses

import pytest

from llmc import targets
from llmc.errors import UnsupportedError
from llmc.schedules.cpu import linear
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.schedules.registry import choose, signature

HOST = targets.parse("cpu")
FAMILIES = targets.module_for(HOST).families(HOST)


def test_the_first_match_takes_the_call_and_says_why() -> None:
    for call in linear.SHAPES.values():
        family, why = choose(call, HOST, FAMILIES)
        assert family is linear and call.args[1].dtype in why


@pytest.mark.parametrize(
    "call",
    [
        dataclasses.replace(linear.SHAPES["square_576"], attrs=(("activation", "swish9"),)),
        KernelCall("llmc.unheard_of", (TensorSpec(("n", 3), "float32"),), TensorSpec(("n", 3), "float32")),
        KernelCall(
            "llmc.linear", (TensorSpec(("n", 8), "float64"), TensorSpec((4, 8), "float64")), TensorSpec(("n", 4), "float64"),
            (("activation", "none"),),
        ),
    ],
)  # fmt: skip
def test_no_match_names_the_op_the_shapes_and_the_target(call: KernelCall) -> None:
    with pytest.raises(UnsupportedError) as caught:
        choose(call, HOST, FAMILIES)
    assert f"{call.op}{signature(call)}" in str(caught.value) and HOST.name in str(caught.value)
