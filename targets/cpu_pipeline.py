"""From scheduled TIR to what LLVM's code generator takes, for CPUs: TVM's own passes, those that matter on a CPU.

TVM's default list compacts buffer regions, eliminates common subexpressions and removes what does nothing besides. The kernels
here allocate what they need, and LLVM does the rest itself; without them a model compiles in half the time.
"""

from __future__ import annotations

from math import prod
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm
from tvm import s_tir, tirx
from tvm_ffi.structural import structural_map

PIPELINE = "llmc.cpu"
"""The name by which ``relax.build`` and ``tvm.tirx.build`` take the list."""
TVM_STACK = 1024
"""Bytes of a buffer below which TVM puts it on the stack. It takes a larger one from the system each time it is wanted: a page
fault for every page of it, in every step."""
STACK = 256 << 10
"""The same here."""
DIRECT_CALL = -1
"""``calling_conv`` of a function that other functions of its module call by name, with pointers and numbers."""
_TRUE = tirx.const(True, "bool")


@tvm.tirx.transform.prim_func_pass(opt_level=0, name="llmc.LocalMemory")
def _local_memory(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """Say that a function for direct calls runs on the host, as MakePackedAPI says of the others: what lowers a thread's larger
    buffers asks for it."""
    if int(function.attrs.get("calling_conv", 0)) != DIRECT_CALL:
        return function
    node, body = tvm.ir.StringImm("default"), function.body
    for key, value in (("device_id", 0), ("device_type", 1)):
        body = tirx.AttrStmt(node, key, tirx.const(value, "int32"), body)
    return function.with_body(body)


@tvm.tirx.transform.prim_func_pass(opt_level=0, name="llmc.ScratchOnStack")
def _scratch_on_stack(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """Keep buffers of a constant size up to :data:`STACK` from being turned into calls of the system's allocator."""

    def keep(alloc: tirx.AllocBuffer) -> tirx.AllocBuffer:
        shape = alloc.buffer.shape
        if not all(isinstance(dim, tirx.IntImm) for dim in shape):
            return alloc
        size = prod(int(dim) for dim in shape) * tvm.DataType(alloc.buffer.dtype).itemsize
        return tirx.AllocBuffer(alloc.buffer, {"disable_lower_builtin": _TRUE}) if TVM_STACK <= size <= STACK else alloc

    return function.with_body(structural_map(function.body, [(tirx.AllocBuffer, keep)], order="post"))


@tvm.transform.module_pass(opt_level=0)
def lower_cpu(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """Every pass between the schedules and the code generator's finishing touches."""
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
        _local_memory,
        _scratch_on_stack,
    ]
    return tvm.transform.Sequential(passes)(module)


def _pipeline() -> tuple[Any, Any, Any]:
    """The passes, then TVM's own for host and device code (of which there is none)."""
    return lower_cpu, s_tir.pipeline.finalize_host_passes, s_tir.pipeline.finalize_device_passes


tirx.register_tir_pipeline(PIPELINE, _pipeline)
