"""Which configurations are fast, learned from measurements: gradient-boosted trees with a ranking objective (XGBoost).

Times of different calls cannot be compared, ranks within one call can: every (call, device, sizes) is a group of its own, and one
model learns from all groups of a family ("Learning to Optimize Tensor Programs", Chen et al., 2018). A feature is the logarithm of
an axis of the configuration, of a dimension of the call, or of a dimension over an axis: how often a tile fits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.schedules.protocol import KernelCall
from llmc.schedules.records import Record, axes, restore
from llmc.tune.search import Config, numbers

PARAMETERS = {
    "objective": "rank:pairwise", "eta": 0.15, "max_depth": 3, "min_child_weight": 0.0, "reg_lambda": 0.1, "colsample_bytree": 0.5,
    "lambdarank_pair_method": "mean", "lambdarank_num_pair_per_sample": 32, "nthread": 1, "seed": 0, "verbosity": 0,
}  # fmt: skip
"""For tens of samples: shallow trees, each from half of the features, without the usual lower bound on what a leaf holds."""

ROUNDS = 200
LEAST = 6
"""Samples to learn from, at least: before, trials are spread over the space."""

GRADES = 31
"""Grades of speed within a group: ranking wants integers. The best is the highest."""


def features(config: Config, call: KernelCall) -> dict[str, float]:
    """The numbers a tree may split on, by name. What a configuration does not have is unknown to the trees.

    A part's axis (:mod:`llmc.schedules.parts`) is a name, and the kernel's own axes below it are features as if there were no
    parts: what is learned of one range of rows is tried on the next.
    """
    axes = dict(numbers(config))
    sizes = [math.log2(d) for spec in call.args[:2] for d in spec.shape if isinstance(d, int) and d > 0]
    found = {**axes, "all": sum(axes.values())}
    for i, size in enumerate(sizes):
        found |= {f"size{i}": size, **{f"size{i}/{name}": size - value for name, value in axes.items()}}
    return found


class CostModel:
    """Ranks configurations of one family's calls. Fit again after every batch: it takes a fraction of a second."""

    def __init__(self, space_of: Callable[[KernelCall], dict[str, list[Any]]]) -> None:
        """``space_of(call)``: the family's space for a call. Raises ImportError without XGBoost."""
        import xgboost

        self._xgb, self._space_of = xgboost, space_of
        self._booster: Any = None
        self._columns: list[str] = []

    def fit(self, records: Sequence[Record]) -> None:
        """Learn from all records of the family; those of one call, part and device are ranked among themselves, failed ones
        last."""
        groups: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for r in records:
            seconds = math.inf if r.seconds is None else r.seconds
            groups[r.call, axes(r.config), r.target, r.device][r.config].append(seconds)
        rows, grades, ids = [], [], []
        for number, ((call, names, *_), times) in enumerate(groups.items()):
            space = {axis: values for axis, values in self._space_of(call).items() if axis in names}
            known = {text: c for text in times if (c := restore(text, space)) is not None}
            total = {text: float(np.mean(np.log(times[text]))) for text in known}
            best = min((t for t in total.values() if t < math.inf), default=0.0)
            for text, config in known.items():
                rows.append(features(config, call))
                grades.append(round((GRADES - 1) * math.exp(2 * (best - total[text]))) if total[text] < math.inf else 0)
                ids.append(number)
        if len(rows) < LEAST or len(set(grades)) < 2:
            return
        self._columns = sorted({name for row in rows for name in row})
        data = self._xgb.DMatrix(self._matrix(rows), label=np.array(grades, np.float32), qid=np.array(ids))
        self._booster = self._xgb.train(PARAMETERS, data, ROUNDS)

    def _matrix(self, rows: Sequence[dict[str, float]]) -> np.ndarray:
        return np.array([[row.get(name, math.nan) for name in self._columns] for row in rows], np.float32)

    @property
    def ready(self) -> bool:
        """Whether there was anything to learn from."""
        return self._booster is not None

    def score(self, configs: Sequence[Config], call: KernelCall) -> list[float]:
        """Higher is faster."""
        data = self._xgb.DMatrix(self._matrix([features(c, call) for c in configs]))
        return [float(v) for v in self._booster.predict(data)]
