"""What the GPUs that the portable kernels run on can do, as data. Schedules read these numbers and nothing else.

Sources: the AMD "Instinct MI200", "MI300", "RDNA3" and "RDNA4" instruction set references (waves, LDS, registers), Apple's
"Metal feature set tables" (threads, threadgroup memory), and the minima that the OpenCL 1.2 full profile promises.
"""

from __future__ import annotations

from typing import Any

_KB = 1 << 10
# TVM's code generator reserves registers for blocks of 256 threads where no GPU can be asked; larger ones would not start.
_AMD_THREADS = 256
_CDNA = {
    "warp_size": 64, "max_threads": _AMD_THREADS, "shared_memory": 64 * _KB, "registers": 131072, "vector_registers": 256,
}  # fmt: skip
_RDNA = {"warp_size": 32, "max_threads": _AMD_THREADS, "shared_memory": 64 * _KB, "registers": 98304, "vector_registers": 256}
_APPLE = {
    "warp_size": 32, "max_threads": 1024, "shared_memory": 32 * _KB, "registers": 53248, "vector_registers": 128, "max_lanes": 4,
}  # fmt: skip

ROCM: dict[str, dict[str, Any]] = {
    "gfx90a": {**_CDNA, "multiprocessors": 104},
    "gfx942": {**_CDNA, "multiprocessors": 304},
    "gfx1100": {**_RDNA, "multiprocessors": 96},
    "gfx1201": {**_RDNA, "multiprocessors": 64},
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
