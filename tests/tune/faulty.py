"""A kernel family some of whose configurations crash, hang, are refused or are wrong; and the worker process that knows it."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np

from llmc import targets
from llmc.schedules.cpu import linear
from llmc.schedules.protocol import KernelCall

FAULTS = ("none", "crash", "hang", "wrong", "refused", "fine")


class Faulty:
    """``cpu.linear`` with an axis that says what goes wrong."""

    NAME, OP, SHAPES = "test.faulty", linear.OP, linear.SHAPES

    def matches(self, call: KernelCall, target: Any) -> str | None:
        return linear.matches(call, target)

    def space(self, call: KernelCall, target: Any) -> dict[str, list[Any]]:
        return {"fault": list(FAULTS), "row_block": linear.space(call, target)["row_block"][:2]}

    def build(self, call: KernelCall, target: Any, config: dict[str, Any]) -> Any:
        fault = config["fault"]
        if fault == "crash":
            os.abort()
        if fault == "hang":
            time.sleep(600)
        if fault == "refused":
            raise ValueError("this configuration is refused")
        if fault == "wrong":
            attrs = tuple(sorted({**dict(call.attrs), "activation": "relu"}.items()))
            call = dataclasses.replace(call, attrs=attrs)
        others = {axis: values[0] for axis, values in linear.space(call, target).items()}
        return linear.build(call, target, {**others, "row_block": config["row_block"]})

    def reference(self, call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
        return linear.reference(call, *arrays)

    def roofline(self, call: KernelCall, **symbols: int) -> tuple[int, int]:
        return linear.roofline(call, **symbols)


FAULTY = Faulty()


def main() -> None:
    from llmc.targets import cpu
    from llmc.tune.worker import serve

    families = cpu.families
    cpu.families = lambda target: (*families(target), FAULTY)  # type: ignore[assignment]
    serve()


def host() -> Any:
    return targets.parse("cpu")


if __name__ == "__main__":
    main()
