"""A candidate on a CPU is timed as a model's step runs it: many calls in one parallel region, each with tensors of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest

from llmc import targets
from llmc.schedules.cpu import attend, linear, quantized_linear
from llmc.tune import inputs
from llmc.tune.bench import Bench
from llmc.tune.build import compile_one
from llmc.tune.devices import open_device

HOST = targets.parse("cpu")
PAGED = [
    {"n": 2, "b": 2, "b+1": 3, "m": 4, "num_pages": 8, "context": 30},
    {"n": 3, "b": 3, "b+1": 4, "m": 5, "num_pages": 15, "context": 33},
]
CASES = {
    "linear": (linear, linear._call(40, 72, bias=1), [{"n": 1}, {"n": 7}]),
    "quantized": (quantized_linear, quantized_linear.SHAPES["odd_33x70_int8"], [{"n": 1}, {"n": 8}]),
    "attention": (attend, dataclasses.replace(attend._call(4, 2, 16, page_size=8), phase="decode"), PAGED),
}


@pytest.mark.parametrize("name", CASES)
def test_every_call_of_a_step_computes_its_own_result(name: str) -> None:
    family, call, sizes = CASES[name]
    config = {axis: values[0] for axis, values in family.space(call, HOST).items()}
    made, device = compile_one(family, call, HOST, config, sizes, [3]), open_device("cpu")
    for symbols in sizes:
        sets, results, wanted = [], [], []
        for seed in range(3):
            arrays = inputs.make(call, symbols, seed)
            out, view = device.empty(call.result.bind(symbols), call.result.dtype)
            device.fill(out, 0xFF)
            sets += [*(device.upload(a, spec.dtype) for a, spec in zip(arrays, call.args, strict=True)), view]
            results.append(out)
            wanted.append(inputs.expected(family, call, symbols, arrays))
        made.steps[3](*sets)
        for out, right in zip(results, wanted, strict=True):
            assert inputs.error(call, symbols, out, right) <= inputs.tolerance(call)
        assert not np.array_equal(wanted[0], wanted[1])


def test_a_call_is_timed_as_part_of_a_step() -> None:
    family, call, sizes = CASES["quantized"]
    arrays = [inputs.make(call, s) for s in sizes]
    device = _Counting()
    bench = Bench(device, call, sizes, arrays, [inputs.expected(family, call, s, a) for s, a in zip(sizes, arrays, strict=True)])
    config = {axis: values[0] for axis, values in family.space(call, HOST).items()}
    made = compile_one(family, call, HOST, config, sizes, bench.repeats)
    bench.check(made.kernel)
    for timer in bench.timers(made.kernel, made.steps):
        assert timer() > 0
    assert device.tensors == [count * (len(call.args) + 1) for count in bench.repeats]


class _Counting:
    """The CPU; ``tensors``: how many each of the timed functions takes."""

    rotated = 1 << 20

    def __init__(self) -> None:
        self._device, self.tensors = open_device("cpu"), list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def timer(self, kernel: Any, sets: Any) -> Any:
        self.tensors.append(len(sets[0]))
        return self._device.timer(kernel, sets)
