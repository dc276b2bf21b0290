"""Programmatic dependent launch for kernels that know nothing of it: generated ones and the simple families.

A kernel so launched may start while the one before it drains (CUDA programming guide, "Programmatic Dependent Launch and
Synchronization"; PTX ISA, "griddepcontrol"). It lets its successor start at once, and waits for its predecessor before anything
else: the launch latency is hidden, and no memory is touched early. One that waits by itself has read weights before. One kernel
without dependent launch in a row of kernels with it makes its neighbours wait for each other. Kernels in PTX see to it themselves.
"""

from __future__ import annotations

import re
from typing import Any

import tvm
from tvm import tirx
from tvm.script import tirx as T
from tvm_ffi.structural import structural_equal, structural_walk

OFF = "llmc.late"
"""Attribute of a function whose kernels are to wait for the end of the one before."""

LAUNCH_PARAMETERS = "tirx.kernel_launch_params"
DEPENDENT = "tirx.use_programtic_dependent_launch"
_DEVICE_KERNEL = 2
"""``calling_conv`` of a function that a host function launches."""


def supported(arch: str) -> bool:
    """Whether the architecture (``"sm_90a"``) has the instruction: from compute capability 9.0 on."""
    number = re.match(r"sm_(\d+)", arch)
    return number is not None and int(number[1]) >= 90


def forbid(module: tvm.IRModule) -> tvm.IRModule:
    """The module with kernels that :func:`request` leaves alone."""
    late = module.clone()
    for var, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc):
            late.update_func(var, function.with_attr(OFF, True))
    return late


def request(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Before host and device code are split: the kernels' launches are dependent ones, if the target has them."""
    if not supported(str(target.attrs["arch"])):
        return module

    def ask(function: Any) -> Any:
        if not isinstance(function, tirx.PrimFunc) or OFF in function.attrs:
            return function
        return function.with_attr(LAUNCH_PARAMETERS, [DEPENDENT])

    return tvm.IRModule({var: ask(function) for var, function in module.functions.items()}, attrs=module.attrs)


def _waits(body: Any) -> bool:
    """Whether a kernel's body has the wait in it."""
    wait = T.ptx.griddepcontrol.wait()
    found: list[Any] = []
    structural_walk(body, (tvm.ir.Call, lambda c: found.append(c) if structural_equal(c, wait) else None))
    return bool(found)


def _is_dependent(function: Any) -> bool:
    """Whether it is a kernel with a dependent launch."""
    launched = isinstance(function, tirx.PrimFunc) and int(function.attrs.get("calling_conv", 0)) == _DEVICE_KERNEL
    return launched and DEPENDENT in [str(p) for p in function.attrs[LAUNCH_PARAMETERS]]


def obey(module: tvm.IRModule) -> tvm.IRModule:
    """After the split: kernels with a dependent launch begin with the release of their successor, and the wait if it is missing."""

    def begin(function: Any) -> Any:
        if not _is_dependent(function):
            return function
        calls = [T.ptx.griddepcontrol.launch_dependents, T.ptx.griddepcontrol.wait]
        first = [tirx.Evaluate(call()) for call in calls[: 1 if _waits(function.body) else 2]]
        return function.with_body(tirx.SeqStmt([*first, function.body]))

    return tvm.IRModule({var: begin(function) for var, function in module.functions.items()}, attrs=module.attrs)


def promise_nothing(module: tvm.IRModule) -> tvm.IRModule:
    """After the split: kernels with a dependent launch, of any kind, have no ``__restrict__`` pointers. The compiler would take
    what is only read for constant, and might read it above the wait for the kernel that writes it."""
    late = {v: f.with_attr("tirx.noalias", False) if _is_dependent(f) else f for v, f in module.functions.items()}
    return tvm.IRModule(late, attrs=module.attrs)
