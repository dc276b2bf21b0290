"""One kernel call on one device: its inputs, whether a candidate's result is right, and how long it takes.

Thin, like everything that a machine without a compiler runs: ``tvm_ffi`` and NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import numpy as np

from llmc.runtime.gpu.cudart import device_bytes
from llmc.schedules.protocol import KernelCall
from llmc.tune import inputs

MOST_SETS = 48
CALLS = 8
"""Calls that are timed as one step of a model: beyond, only compiling the step takes longer."""


LEAST = 1e-8
"""Seconds that a call takes at least: behind another kernel it is timed as a difference."""


@dataclass(frozen=True)
class Before:
    """The kernel that runs before the candidates, as in a model. ``sizes``, ``arrays``: its own, for each size of theirs."""

    kernel: Callable[..., Any]
    call: KernelCall
    sizes: Sequence[dict[str, int]]
    arrays: Sequence[Sequence[np.ndarray]]


@dataclass
class _Case:
    """A call at one size. ``sets``: arguments over copies of the inputs; ``out``: the buffer of the first set's result;
    ``before``: as many sets of the kernel before."""

    symbols: dict[str, int]
    sets: list[list[Any]]
    out: Any
    wanted: np.ndarray
    before: list[list[Any]] = field(default_factory=list)


class WrongResult(Exception):
    """A candidate computed something else than the reference."""


class Bench:
    """Checks and times candidates of one call at each of ``sizes``."""

    def __init__(
        self,
        device: Any,
        call: KernelCall,
        sizes: Sequence[dict[str, int]],
        arrays: Sequence[Sequence[np.ndarray]],
        wanted: Sequence[np.ndarray],
        before: Before | None = None,
    ) -> None:
        """``arrays``, ``wanted``: what :func:`llmc.tune.inputs.make` and :func:`~llmc.tune.inputs.expected` give for each of
        ``sizes``. ``before``: candidates are timed behind it, and not behind themselves."""
        self.device, self.call, self.before = device, call, before
        self._cases = [self._case(*case) for case in zip(sizes, arrays, wanted, strict=True)]
        if before is not None:
            for case, symbols, own in zip(self._cases, before.sizes, before.arrays, strict=True):
                case.before = list(islice(cycle(self._sets(before.call, symbols, own)[0]), len(case.sets)))
        self._before_timers: dict[int, Callable[[], float]] = {}

    def _case(self, symbols: dict[str, int], arrays: Sequence[np.ndarray], wanted: np.ndarray) -> _Case:
        sets, first = self._sets(self.call, symbols, arrays)
        return _Case(symbols, sets, first, wanted)

    def _sets(self, call: KernelCall, symbols: dict[str, int], arrays: Sequence[np.ndarray]) -> tuple[list[list[Any]], Any]:
        """Arguments over copies of the inputs that are together larger than the caches; the buffer of the first set's result."""
        total = sum(device_bytes(spec.bind(symbols), spec.dtype) for spec in (*call.args, call.result))
        sets, first = [], None
        count = min(MOST_SETS, max(1, -(-self.device.rotated // total)))
        for _ in range(count if count < CALLS else -(-count // CALLS) * CALLS):
            buffer, out = self.device.empty(call.result.bind(symbols), call.result.dtype)
            uploaded = [self.device.upload(a, spec.dtype) for a, spec in zip(arrays, call.args, strict=True)]
            sets.append([*uploaded, out])
            first = buffer if first is None else first
        return sets, first

    def check(self, kernel: Callable[..., Any]) -> float:
        """The largest error over all sizes. Raises WrongResult if one is beyond the tolerance (or a result not written at all)."""
        worst = 0.0
        for case in self._cases:
            self.device.fill(case.out, 0xFF)  # NaN in every dtype
            self.device.run(kernel, case.sets[0])
            error = inputs.error(self.call, case.symbols, self.device.download(case.out), case.wanted)
            if not error <= inputs.tolerance(self.call):
                raise WrongResult(f"wrong result: off by {error:.2g} of the largest value at {case.symbols}")
            worst = max(worst, error)
        return worst

    @property
    def repeats(self) -> list[int]:
        """For each size, how many calls are timed as one step."""
        return [min(CALLS, len(case.sets)) for case in self._cases]

    def timers(
        self, kernel: Callable[..., Any], steps: Mapping[int, Callable[..., Any]] | None = None
    ) -> list[Callable[[], float]]:
        """For each size a function that gives the seconds of one call now.

        ``steps``: by the number of calls, a function that makes them all as a step of a model does. A call is timed as part of such
        a step where there is one: alone it would begin with threads asleep. Behind a kernel before it takes what it adds to that
        one's time: it may have started, and fetched weights, while that one ended.
        """
        if self.before is not None:
            return [self._behind(i, case, kernel, self.before.kernel) for i, case in enumerate(self._cases)]
        return [self._timer(case, kernel, steps or {}, calls) for case, calls in zip(self._cases, self.repeats, strict=True)]

    def _behind(self, number: int, case: _Case, kernel: Callable[..., Any], before: Callable[..., Any]) -> Callable[[], float]:
        count = len(case.before[0])

        def both(*arguments: Any) -> None:
            before(*arguments[:count])
            kernel(*arguments[count:])

        if number not in self._before_timers:
            self._before_timers[number] = self.device.timer(before, case.before)
        alone = self._before_timers[number]
        pair = self.device.timer(both, [[*first, *second] for first, second in zip(case.before, case.sets, strict=True)])
        return lambda: max(pair() - alone(), LEAST)

    def _timer(
        self, case: _Case, kernel: Callable[..., Any], steps: Mapping[int, Callable[..., Any]], calls: int
    ) -> Callable[[], float]:
        if calls not in steps:
            return self.device.timer(kernel, case.sets)
        starts = range(0, len(case.sets), calls)
        groups = [[argument for one in case.sets[i : i + calls] for argument in one] for i in starts]
        step = self.device.timer(steps[calls], groups)
        return lambda: step() / calls
