"""How many threads kernels run on: TVM's pool of them, which it keeps one of for each thread that runs kernels."""

from __future__ import annotations

import os
import threading
from typing import Any

from llmc.runtime.host import host

# runtime.config_threadpool: the workers share the given processors, pinned to none of them
_SHARE_ALL_CORES = -3
# How often an idle worker of TVM's pool looks for work before it sleeps: a millisecond or two, which bridges the time between two
# steps. TVM's own 300000 keep a core busy for a tenth of a second after every answer. Read when the first pool is made.
_SPIN_VARIABLE, _SPINS = "TVM_THREAD_POOL_SPIN_COUNT", "4000"


class _Pool(threading.local):
    """What the calling thread's pool is set to."""

    threads = 0


_pool = _Pool()


def use_threads(ffi: Any, count: int) -> None:
    """Let the kernels that the calling thread runs have ``count`` threads, free to move over the processors of this process.

    The pool is made on first use and cannot grow, so its size is all of those processors and ``count`` is how many work.
    """
    if _pool.threads != count:
        os.environ.setdefault(_SPIN_VARIABLE, _SPINS)
        configure = ffi.get_global_func("runtime.config_threadpool")
        configure(_SHARE_ALL_CORES, count, [str(cpu) for cpu in host().cpus])
        _pool.threads = count
