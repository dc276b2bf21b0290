"""From scheduled TIR to what code generators for GPUs take: TVM's own passes, those that the kernels here have use for.

TVM's default list shrinks buffers to what is accessed of them besides, hoists conditions and removes what does nothing, which is
two thirds of the whole lowering: the kernels here allocate what they need, and get the same code without. It also has passes for
software pipelines, layouts of other kernels' matrix instructions, virtual threads and double buffers, which nothing here asks for.
"""

from __future__ import annotations

from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import tvm
from tvm import s_tir, tirx
from tvm_ffi.structural import structural_map

PIPELINE = "llmc.gpu"
"""The name by which ``relax.build`` and ``tvm.tirx.build`` take the list."""


@tvm.transform.module_pass(opt_level=0)
def lower_gpu(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """Every pass between the schedules and the code generators' finishing touches."""
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerCrossThreadReduction(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LiftThreadBinding(),
        s_tir.transform.UnifyThreadBinding(),
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
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        s_tir.transform.ThreadSync("shared"),
        s_tir.transform.ThreadSync("shared.dyn"),
        s_tir.transform.ThreadSync("warp"),
        s_tir.transform.LowerThreadAllreduce(),
        s_tir.transform.MergeSharedMemoryAllocations(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
    ]
    return tvm.transform.Sequential(passes)(module)


@tirx.transform.prim_func_pass(opt_level=0, name="llmc.ExactNumbers")
def _exact_numbers(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """Spell float32 constants by their bits where TVM's writers of OpenCL and Metal, which give seven digits, would change them:
    what rounds by adding 1.5 · 2^23 would be off by two."""
    if function.attrs["target"].kind.name not in ("opencl", "metal"):
        return function

    def spell(number: tirx.FloatImm) -> Any:
        value = np.float32(number.value)
        if str(number.ty.dtype) != "float32" or not np.isfinite(value) or np.float32(f"{value:.6e}") == value:
            return number
        return tirx.reinterpret("float32", tirx.const(int(value.view(np.uint32)), "uint32"))

    return function.with_body(structural_map(function.body, [(tirx.FloatImm, spell)], order="post"))


def _finalize_device() -> Any:
    return tvm.transform.Sequential([s_tir.pipeline.finalize_device_passes(), _exact_numbers])


def _pipeline() -> tuple[Any, Any, Any]:
    """The passes, TVM's own for host code, and for device code."""
    return lower_gpu, s_tir.pipeline.finalize_host_passes, _finalize_device


tirx.register_tir_pipeline(PIPELINE, _pipeline)
