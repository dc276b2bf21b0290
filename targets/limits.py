"""What the GPUs that the portable kernels run on can do, as data. Schedules read these numbers and nothing else.

Sources: the AMD "Instinct MI200", "MI300", "RDNA3" and "RDNA4" instruction set references (waves, LDS, registers, operands of
V_MFMA and V_WMMA), NVIDIA's PTX ISA (mma), Apple's "Metal feature set tables" (threads, threadgroup memory) and "Metal Shading
Language Specification" (simdgroup matrices), and the minima that the OpenCL 1.2 full profile promises.
"""

from __future__ import annotations

from typing import Any

from llmc.targets.base import MatrixInstruction

_KB = 1 << 10
_WORDS = "int32"
MMA = MatrixInstruction(
    "ptx",
    (16, 8, 16),
    tuple((d, f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32", _WORDS) for d, t in (("bfloat16", "bf16"), ("float16", "f16"))),
)
"""NVIDIA, from sm_80 on."""

MFMA = MatrixInstruction(
    "lanes",
    (16, 16, 16),
    (("bfloat16", "mfma_f32_16x16x16_bf16", _WORDS), ("float16", "mfma_f32_16x16x16_f16", _WORDS)),
    width=4,
    strides=(4, 1),
)
"""AMD CDNA2 and 3: waves of 64."""

WMMA = MatrixInstruction(
    "lanes",
    (16, 16, 16),
    (("bfloat16", "wmma_f32_16x16x16_bf16_w16", _WORDS), ("float16", "wmma_f32_16x16x16_f16_w16", _WORDS)),
    width=16,
    strides=(1, 2),
)
"""AMD RDNA3: waves of 32, whose halves hold the same operands."""

WMMA_12 = MatrixInstruction(
    "lanes",
    (16, 16, 16),
    (("bfloat16", "wmma_f32_16x16x16_bf16_w8", _WORDS), ("float16", "wmma_f32_16x16x16_f16_w8", _WORDS)),
    width=8,
    strides=(8, 1),
)
"""AMD RDNA4: waves of 32, each half with half of the operands."""

SIMDGROUP = MatrixInstruction(
    "simdgroup",
    (8, 8, 8),
    (("bfloat16", "simdgroup_multiply_accumulate", "float32"), ("float16", "simdgroup_multiply_accumulate", "float16")),
)
"""Apple. TVM's code generator has no matrices of bfloat16 for Metal: they are multiplied as float32, without a loss."""

# TVM's code generator reserves registers for blocks of 256 threads where no GPU can be asked; larger ones would not start.
_AMD_THREADS = 256
_CDNA = {
    "warp_size": 64, "max_threads": _AMD_THREADS, "shared_memory": 64 * _KB, "registers": 131072, "vector_registers": 256,
    "matrix": MFMA,
}  # fmt: skip
_RDNA = {"warp_size": 32, "max_threads": _AMD_THREADS, "shared_memory": 64 * _KB, "registers": 98304, "vector_registers": 256}
_APPLE = {
    "warp_size": 32, "max_threads": 1024, "shared_memory": 32 * _KB, "registers": 53248, "vector_registers": 128, "max_lanes": 4,
    "matrix": SIMDGROUP,
}  # fmt: skip

ROCM: dict[str, dict[str, Any]] = {
    "gfx90a": {**_CDNA, "multiprocessors": 104},
    "gfx942": {**_CDNA, "multiprocessors": 304},
    "gfx1100": {**_RDNA, "multiprocessors": 96, "matrix": WMMA},
    "gfx1201": {**_RDNA, "multiprocessors": 64, "matrix": WMMA_12},
}
"""AMD GPUs: MI200, MI300, RX 7900, RX 9070. Waves of 64 on CDNA and of 32 on RDNA, LLVM's defaults."""

METAL: dict[str, dict[str, Any]] = {
    "apple7": {**_APPLE, "multiprocessors": 8},
    "apple8": {**_APPLE, "multiprocessors": 10},
    "apple9": {**_APPLE, "multiprocessors": 10},
}
"""Apple GPU families: M1, M2, M3 and later. Metal's vectors have four elements at most."""

OPENCL: dict[str, dict[str, Any]] = {
    "generic": {
        "warp_size": 32, "max_threads": 256, "shared_memory": 32 * _KB, "registers": 65536, "vector_registers": 64,
        "multiprocessors": 16, "lane_exchange": False,
    },
}  # fmt: skip
"""Any OpenCL device. Sub-groups are an extension, so threads meet in local memory; ``warp_size`` is a planning figure."""
