"""What to try next: all configurations of a space ranked by what is believed of them, and neighbours of the best.

Spaces of hand-written kernels have tens to hundreds of points, so all of them are ranked at once; there is nothing to evolve.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llmc.schedules.records import config_text

Config = dict[str, Any]
EXPLORED = 0.5
"""Part of a batch that is chosen for being next to the best so far. Good points lie near each other and near what was picked by
hand, and a space is searched in tens of trials."""

FIRST = 5
"""Configurations of a call that are tried, the default among them, before what the cost model believes counts."""

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


def numbers(config: Config) -> Iterator[tuple[str, float]]:
    """The axes of a configuration, those of a part's kernel too (:mod:`llmc.schedules.parts`), as logarithms: a step of one
    doubles. A name counts as an axis that is there or not; a tile has its size as one more, ``tile*``, and each of several tiles is
    an axis."""
    for axis, value in config.items():
        if isinstance(value, dict):
            yield f"is {axis}", 1.0
            yield from numbers(value)
        elif isinstance(value, str):
            yield f"{axis} is {value}", 1.0
        elif isinstance(value, tuple | list) and value and isinstance(value[0], tuple | list):
            yield from numbers({f"{axis}[{i}]": part for i, part in enumerate(value)})
        else:
            parts = [math.log2(1 + abs(float(p))) for p in (value if isinstance(value, tuple | list) else (value,))]
            yield from ((f"{axis}{i or ''}", p) for i, p in enumerate(parts))
            if len(parts) > 1:
                yield f"{axis}*", math.log2(math.prod(2**p for p in parts))


OTHER = 2.0
"""Steps that an axis counts for which one of two configurations has not."""


TRADE = 0.1
"""What a step that another pays for is shorter by."""


def near(candidates: Sequence[Config], base: Config, tried: Sequence[Config], count: int, rng: random.Random) -> list[Config]:
    """``count`` of the candidates: the fewest steps from ``base``, and each in a direction (which axes change, up or down) that no
    tried one and no other of them lies in, as long as there are such.

    A step up on one axis and one down on another count as one, and a little less: warps for tiles, or for depth, is a trade within
    the resources that the base fills.
    """
    origin = _axes(base)

    def changes(config: Config) -> dict[str, float]:
        here = _axes(config)
        both = {axis: here[axis] - origin[axis] for axis in here.keys() & origin.keys() if here[axis] != origin[axis]}
        return both | dict.fromkeys(here.keys() ^ origin.keys(), OTHER)

    pool = list(candidates)
    rng.shuffle(pool)
    ways = {id(c): changes(c) for c in pool}
    pool.sort(key=lambda c: _steps(ways[id(c)]))
    seen = {_direction(changes(c)) for c in tried}
    chosen: list[Config] = []
    for config in pool:
        direction = _direction(ways[id(config)])
        if direction not in seen and len(chosen) < count:
            seen.add(direction)
            chosen.append(config)
    taken = set(map(id, chosen))
    return chosen + [c for c in pool if id(c) not in taken][: count - len(chosen)]


def _axes(config: Config) -> dict[str, float]:
    return {axis: value for axis, value in numbers(config) if not axis.endswith("*")}


def _steps(changes: dict[str, float]) -> float:
    """Steps up or steps down, whichever are more; of as many, a trade has a little less."""
    up, down = sum(v for v in changes.values() if v > 0), -sum(v for v in changes.values() if v < 0)
    return max(up, down) - TRADE * min(up, down)


def _direction(changes: dict[str, float]) -> frozenset[tuple[str, bool]]:
    return frozenset((axis, change > 0) for axis, change in changes.items())


def propose(
    candidates: Sequence[Config],
    tried: Sequence[Config],
    count: int,
    score: Callable[[Sequence[Config]], Sequence[float]] | None,
    rng: random.Random,
) -> list[Config]:
    """The next ``count`` configurations (fewer if there are no more): the best by ``score`` (higher is better), and some near the
    first of ``tried``, which is the best so far. Without a score all are of these.

    A search of a device asks without a score first (:data:`FIRST`): what other shapes say of this one is a guess, and neighbours
    show what this one gains by.
    """
    done = {config_text(c) for c in tried}
    left = [c for c in candidates if config_text(c) not in done]
    if score is None or not left:
        return near(left, tried[0] if tried else candidates[0], tried, count, rng)
    explored = math.ceil(count * EXPLORED) if len(left) > count > 1 else 0
    values = score(left)
    order = sorted(range(len(left)), key=lambda i: -values[i])
    best = [left[i] for i in order[: count - explored]]
    rest = [left[i] for i in order[count - explored :]]
    return best + near(rest, tried[0] if tried else candidates[0], [*tried, *best], explored, rng)
