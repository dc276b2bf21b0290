"""What to try next: all configurations of a space ranked by what is believed of them, with some chosen to learn from.

Spaces of hand-written kernels have tens to hundreds of points, so all of them are ranked at once; there is nothing to evolve.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from llmc.schedules.records import config_text

Config = dict[str, Any]
EXPLORED = 0.2
"""Part of a batch that is chosen for being unlike everything tried."""

LARGEST = 20_000


def enumerate_space(space: dict[str, list[Any]], rng: random.Random) -> list[Config]:
    """Every configuration, the default first; of a space too large for that, ``LARGEST`` random ones and the default."""
    axes, values = list(space), list(space.values())
    count = 1
    for v in values:
        count *= len(v)
    if count <= LARGEST:
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*values)]
    default = {axis: v[0] for axis, v in space.items()}
    drawn = ({axis: rng.choice(v) for axis, v in space.items()} for _ in range(LARGEST))
    return list({config_text(c): c for c in [default, *drawn]}.values())


def unlike(candidates: Sequence[Config], tried: Sequence[Config], count: int, rng: random.Random) -> list[Config]:
    """``count`` of the candidates, each the one that differs in most axes from all tried and chosen so far."""
    pool, seen = list(candidates), list(tried)
    chosen: list[Config] = []
    rng.shuffle(pool)
    nearest = [min((_differences(c, s) for s in seen), default=len(c)) for c in pool]
    while pool and len(chosen) < count:
        at = max(range(len(pool)), key=nearest.__getitem__)
        pick = pool.pop(at)
        nearest.pop(at)
        chosen.append(pick)
        nearest = [min(d, _differences(c, pick)) for d, c in zip(nearest, pool, strict=True)]
    return chosen


def _differences(a: Config, b: Config) -> int:
    return sum(a[axis] != b[axis] for axis in a)


def propose(
    candidates: Sequence[Config],
    tried: Sequence[Config],
    count: int,
    score: Callable[[Sequence[Config]], Sequence[float]] | None,
    rng: random.Random,
) -> list[Config]:
    """The next ``count`` configurations (fewer if there are no more): the best by ``score`` (higher is better) and some to explore.

    Without a score all are chosen to be unlike each other.
    """
    done = {config_text(c) for c in tried}
    left = [c for c in candidates if config_text(c) not in done]
    if score is None or not left:
        return unlike(left, tried, count, rng)
    explore = math.ceil(count * EXPLORED) if len(left) > count > 1 else 0
    values = score(left)
    order = sorted(range(len(left)), key=lambda i: -values[i])
    best = [left[i] for i in order[: count - explore]]
    rest = [left[i] for i in order[count - explore :]]
    return best + unlike(rest, [*tried, *best], explore, rng)
