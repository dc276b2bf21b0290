"""``llmc.sample``: choose a token for each draw by its own parameters; one thread block a draw, no sort.

Greedy draws take the maximum that ``llmc.sample_stats`` found. For the others a token counts by its distance below that maximum,
as a 32-bit integer: the tokens that may be drawn are those up to a distance, and finding it is a radix select of three digits
(11, 11 and 10 bits). Top-k selects by the number of tokens, top-p by their mass. A bin's mass is exact enough without a float
atomic, and the same in every run: with the bin's first weight taken out, what remains of a token's weight is 1 - e with a small
e, so that two integer sums (tokens, and e in fixed point) give the bin's mass. Min-p is a distance already. Tokens with less than
exp(-32) of the largest weight count as none.

The draw inverts the cumulative distribution in the order of token ids, by sums of runs of ids and then within one run, at the point
that :mod:`.philox` gives for (seed, stream, position): the token that :mod:`llmc.runtime.sampling` draws,
as far as the logits' own rounding goes. Token counts of the penalties go up by the token drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import tirx as T

from llmc.runtime.draws import FIELD, FIELDS, MOST
from llmc.runtime.sampling import SamplingParams, candidates, uniform
from llmc.schedules.cuda import hopper, philox, sample_stats
from llmc.schedules.cuda.sample_stats import CHUNK, INFINITE, WIDTH, magnitude, merge, penalize
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets import dependent_launch
from llmc.targets.base import Target

NAME = "cuda.sample"
OP = "llmc.sample"
THREADS = 1024
BINS = 2048
LEVELS = ((21, 11), (10, 11), (0, 10))
"""Shift and bits of each digit of a distance."""

STEPS = 4.29496e9
"""Distances of a row: just below 2^32, so that rounding does not reach it."""

REACH = 32.0
"""Tokens whose logit over temperature lies further below the largest have no weight."""

LOSS_BITS = 19
"""Fixed-point bits of e in the first digit's bins, where e < 2^-6: half a million of them fit 32 bits. 11 more for each digit."""

LOADS = 8


def _call(vocab: int) -> KernelCall:
    logits, draws, counts = sample_stats._call(vocab).args
    stats = sample_stats._call(vocab).result
    args = (logits, draws, TensorSpec(("n",), "int32"), counts, stats)
    return KernelCall(OP, args, TensorSpec(("n",), "int32"), (), "sample")


SHAPES: dict[str, KernelCall] = {label: _call(int(call.args[0].shape[1])) for label, call in sample_stats.SHAPES.items()}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cuda" or int(call.args[0].shape[1]) > 2 ** (32 - LOSS_BITS + 6):
        return None
    return "a thread block a draw: radix select, then the inverse of the cumulative distribution"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    vocab = int(call.args[0].shape[1])
    chunks, fields = -(-vocab // CHUNK), len(FIELDS)
    run = -(-vocab // (THREADS * 32)) * 32  # ids whose weights are summed together
    steps = run // 32
    group = max(1, LOADS // steps)  # runs that a warp reads at once
    at = FIELD
    early = dependent_launch.supported(target.mcpu)

    @T.prim_func
    def sample(
        logits_ptr: T.handle, draws_ptr: T.handle, positions_ptr: T.handle, counts_ptr: T.handle, stats_ptr: T.handle,
        tokens_ptr: T.handle,
    ) -> None:  # fmt: skip
        rows = T.int64()
        n = T.int64()
        slots = T.int64()
        logits = T.match_buffer(logits_ptr, (rows, vocab), "float32", align=4)
        draws = T.match_buffer(draws_ptr, (n, fields), "int32", align=4)
        positions = T.match_buffer(positions_ptr, (n,), "int32", align=4)
        counts = T.match_buffer(counts_ptr, (slots, vocab), "int16", align=2)
        stats = T.match_buffer(stats_ptr, (n, chunks, WIDTH), "int32", align=4)
        tokens = T.match_buffer(tokens_ptr, (n,), "int32", align=4)
        T.device_entry()
        draw = T.cta_id([T.cast(n, "int32")])
        thread = T.thread_id([THREADS])
        if early:
            T.ptx.griddepcontrol.launch_dependents()
            T.ptx.griddepcontrol.wait()
        bins = T.alloc_buffer((BINS,), "uint32", scope="shared", align=16)
        losses = T.alloc_buffer((BINS,), "uint32", scope="shared", align=16)
        sums = T.alloc_buffer((2, THREADS), "float64", scope="shared", align=16)
        place = T.alloc_buffer((1,), "int32", scope="shared", align=16)
        before = T.alloc_buffer((1,), "float64", scope="shared", align=16)
        point = T.alloc_buffer((1,), "float64", scope="shared", align=16)
        held = T.alloc_local((max(LOADS, group * steps),), "float32")
        value = T.alloc_local((1,), "float32")
        part = T.alloc_local((2,), "float64")
        goal = T.alloc_local((1,), "float64")
        prefix = T.alloc_local((1,), "uint32")
        most = T.alloc_local((1,), "uint32")
        key = T.alloc_local((2,), "uint64")
        found = T.alloc_local((1,), "float32")
        index = T.alloc_local((1,), "int32")
        least = T.alloc_local((1,), "float32")
        broken = T.alloc_local((1,), "int32")

        row: T.int64 = T.cast(draws[draw, at["row"]], "int64")
        slot: T.int32 = draws[draw, at["slot"]]
        temperature: T.float32 = T.reinterpret("float32", draws[draw, at["temperature"]])
        top_p: T.float32 = T.reinterpret("float32", draws[draw, at["top_p"]])
        min_p: T.float32 = T.reinterpret("float32", draws[draw, at["min_p"]])
        repetition: T.float32 = T.reinterpret("float32", draws[draw, at["repetition_penalty"]])
        presence: T.float32 = T.reinterpret("float32", draws[draw, at["presence_penalty"]])
        frequency: T.float32 = T.reinterpret("float32", draws[draw, at["frequency_penalty"]])
        top_k: T.int32 = draws[draw, at["top_k"]]
        lane: T.int32 = thread % 32
        warp: T.int32 = thread // 32

        # Every warp looks at all chunks, its lanes at some each.
        found[0] = T.float32(float("-inf"))
        index[0] = vocab
        least[0] = T.float32(sample_stats.LARGEST)
        broken[0] = 0
        for c in T.unroll(-(-chunks // 32)):
            if lane + c * 32 < chunks:
                merge(
                    found, index, least, T.reinterpret("float32", stats[draw, lane + c * 32, 0]), stats[draw, lane + c * 32, 1],
                    T.reinterpret("float32", stats[draw, lane + c * 32, 2]),
                )  # fmt: skip
                broken[0] = T.bitwise_or(broken[0], stats[draw, lane + c * 32, 3])
        for s in T.unroll(5):
            other: T.float32 = hopper.exchange(found[0], 16 >> s)
            other_index: T.int32 = hopper.exchange(index[0], 16 >> s)
            other_least: T.float32 = hopper.exchange(least[0], 16 >> s)
            broken[0] = T.bitwise_or(broken[0], hopper.exchange(broken[0], 16 >> s))
            merge(found, index, least, other, other_index, other_least)
        top: T.float32 = found[0]
        best: T.int32 = index[0]
        low: T.float32 = least[0]
        nan: T.int32 = broken[0]
        token: T.int32 = best
        reach: T.float32 = T.min(top - low, temperature * T.float32(REACH))
        if min_p > T.float32(0):
            reach = T.min(reach, T.float32(0) - T.log(min_p) * temperature)
        scale: T.float32 = T.float32(0)
        unit: T.float32 = T.float32(0)
        if reach > T.float32(1e-20):
            scale = T.float32(STEPS) / reach
            unit = reach / (T.float32(STEPS) * temperature)

        @T.inline
        def penalized(i) -> None:
            """The penalties of value[0], the logit of token i."""
            if slot >= 0:
                penalize(value, T.cast(counts[T.cast(slot, "int64"), i], "int32"), repetition, presence, frequency)

        @T.inline
        def scan() -> None:
            """sums[0] becomes its inclusive prefix sums; ten steps between two buffers end in the first (Hillis and Steele)."""
            for s in T.unroll(10):
                T.cuda.cta_sync()
                sums[(s + 1) % 2, thread] = sums[s % 2, thread]
                if thread >= 1 << s:
                    sums[(s + 1) % 2, thread] = sums[s % 2, thread] + sums[s % 2, thread - (1 << s)]
            T.cuda.cta_sync()

        @T.inline
        def histogram(level) -> None:
            """Tokens and losses of the bins of a digit, for the tokens in reach that have the digits found before."""
            shift = T.meta_var(LEVELS[level][0])
            digits = T.meta_var(LEVELS[level][1])
            for i in T.unroll(BINS // THREADS):
                bins[thread + i * THREADS] = T.uint32(0)
                losses[thread + i * THREADS] = T.uint32(0)
            T.cuda.cta_sync()
            first: T.int32 = thread
            while first < vocab:
                for u in T.unroll(LOADS):
                    held[u] = T.float32(float("-inf"))
                    if first + u * THREADS < vocab:
                        held[u] = logits[row, first + u * THREADS]
                for u in T.unroll(LOADS):
                    if first + u * THREADS < vocab:
                        value[0] = held[u]
                        penalized(first + u * THREADS)
                        distance: T.float32 = top - value[0]
                        if distance <= reach:
                            q: T.uint32 = T.cast(distance * scale, "uint32")
                            inside: T.bool = q <= most[0]
                            if level > 0:
                                inside = inside and T.shift_right(q, T.uint32(shift + digits)) == prefix[0]
                            if inside:
                                digit: T.int32 = T.cast(
                                    T.bitwise_and(T.shift_right(q, T.uint32(shift)), T.uint32((1 << digits) - 1)), "int32"
                                )
                                x: T.float32 = T.cast(T.bitwise_and(q, T.uint32((1 << shift) - 1)), "float32") * unit
                                e: T.float32 = x * (T.float32(1) - x * (T.float32(0.5) - x * T.float32(1 / 6)))
                                T.cuda.atomic_add(bins.ptr_to([digit]), T.uint32(1))
                                if shift > 0:
                                    T.cuda.atomic_add(
                                        losses.ptr_to([digit]),
                                        T.cast(e * T.float32(2.0 ** (LOSS_BITS + 11 * level)) + T.float32(0.5), "uint32"),
                                    )
                first = first + LOADS * THREADS
            T.cuda.cta_sync()

        @T.inline
        def pick(level, by_mass) -> None:
            """The bin where the sum over the bins reaches the goal: its digit goes to the prefix, what lies before off the goal."""
            shift = T.meta_var(LEVELS[level][0])
            digits = T.meta_var(LEVELS[level][1])
            for i in T.unroll(2):
                part[i] = T.float64(0)
                if thread * 2 + i < 1 << digits:
                    part[i] = T.cast(bins[thread * 2 + i], "float64")
                    if by_mass:
                        start: T.uint32 = T.shift_left(T.cast(thread * 2 + i, "uint32"), T.uint32(shift))
                        if level > 0:
                            start = start + T.shift_left(prefix[0], T.uint32(shift + digits))
                        loss: T.float64 = T.cast(losses[thread * 2 + i], "float64") / T.float64(2.0 ** (LOSS_BITS + 11 * level))
                        weight: T.float32 = T.exp(T.float32(0) - T.cast(start, "float32") * unit)
                        part[i] = (part[i] - loss) * T.cast(weight, "float64")
            sums[0, thread] = part[0] + part[1]
            if thread == 0:
                place[0] = (1 << digits) - 1
                before[0] = T.float64(0)
            scan()
            if level == 0:
                if by_mass:
                    goal[0] = sums[0, THREADS - 1] * T.cast(top_p, "float64")
                else:
                    goal[0] = T.cast(top_k, "float64")
            left: T.float64 = T.float64(0)
            if thread > 0:
                left = sums[0, thread - 1]
            if left < goal[0] and sums[0, thread] >= goal[0]:
                second: T.bool = left + part[0] < goal[0]
                place[0] = thread * 2 + T.cast(second, "int32")
                before[0] = left
                if second:
                    before[0] = left + part[0]
            T.cuda.cta_sync()
            goal[0] = goal[0] - before[0]
            if level == 0:
                prefix[0] = T.cast(place[0], "uint32")
            else:
                prefix[0] = T.bitwise_or(T.shift_left(prefix[0], T.uint32(digits)), T.cast(place[0], "uint32"))
            T.cuda.cta_sync()

        @T.inline
        def select(by_mass) -> None:
            histogram(0)
            pick(0, by_mass)
            histogram(1)
            pick(1, by_mass)
            histogram(2)
            pick(2, by_mass)
            most[0] = prefix[0]

        @T.inline
        def weigh(weight, i) -> None:
            """weight[0] of token i, whose logit is value[0]: 0 if it may not be drawn."""
            penalized(i)
            weight[0] = T.float64(0)
            away: T.float32 = top - value[0]
            if away <= reach:  # noqa: SIM102  (beyond it the product may not fit)
                if T.cast(away * scale, "uint32") <= most[0]:
                    weight[0] = T.cast(T.exp((T.float32(0) - away) / temperature), "float64")

        @T.inline
        def crossing(whole) -> None:
            """place[0]: the first thread up to which the sums are above the goal, -1 if rounding left none. ``whole``: the goal is
            the point of all sums."""
            if thread == 0:
                place[0] = -1
            scan()
            if whole:
                goal[0] = sums[0, THREADS - 1] * point[0]
            start: T.float64 = T.float64(0)
            if thread > 0:
                start = sums[0, thread - 1]
            if start <= goal[0] and sums[0, thread] > goal[0]:
                place[0] = thread
                before[0] = start
            T.cuda.cta_sync()

        if temperature > T.float32(0) and nan == 0 and magnitude(top) < INFINITE:
            if thread == 0:
                key[0] = T.bitwise_or(
                    T.cast(T.reinterpret("uint32", draws[draw, at["seed_low"]]), "uint64"),
                    T.shift_left(T.cast(T.reinterpret("uint32", draws[draw, at["seed_high"]]), "uint64"), T.uint64(32)),
                )
                key[1] = T.cast(T.reinterpret("uint32", draws[draw, at["stream"]]), "uint64")
                philox.uniform(point, key, positions[draw])
            most[0] = T.uint32(0xFFFFFFFF)
            if top_k > 0 and top_k < vocab:
                select(False)
            if top_p < T.float32(1):
                select(True)
            for g in T.serial(-(-32 // group)):
                for r in T.unroll(group):
                    for j in T.unroll(steps):
                        id: T.int32 = (warp * 32 + g * group + r) * run + j * 32 + lane
                        held[r * steps + j] = T.float32(0)
                        if g * group + r < 32 and id < vocab:
                            held[r * steps + j] = logits[row, id]
                for r in T.unroll(group):
                    part[1] = T.float64(0)
                    for j in T.unroll(steps):
                        item: T.int32 = (warp * 32 + g * group + r) * run + j * 32 + lane
                        if g * group + r < 32 and item < vocab:
                            value[0] = held[r * steps + j]
                            weigh(part, item)
                            part[1] = part[1] + part[0]
                    for s in T.unroll(5):
                        part[1] = part[1] + hopper.exchange(part[1], 16 >> s)
                    if lane == 0 and g * group + r < 32:
                        sums[0, warp * 32 + g * group + r] = part[1]
            crossing(True)
            chosen: T.int32 = place[0]
            if chosen >= 0:
                goal[0] = goal[0] - before[0]
                T.cuda.cta_sync()
                part[0] = T.float64(0)
                if thread < run and chosen * run + thread < vocab:
                    value[0] = logits[row, chosen * run + thread]
                    weigh(part, chosen * run + thread)
                sums[0, thread] = part[0]
                crossing(False)
                if place[0] >= 0:
                    token = chosen * run + place[0]
        if nan != 0 or magnitude(top) >= INFINITE:
            token = -1
        if thread == 0:
            tokens[draw] = token
            if slot >= 0 and token >= 0:  # noqa: SIM102  (nothing is read for others)
                if T.bitwise_and(T.cast(counts[T.cast(slot, "int64"), token], "int32"), MOST) < MOST:
                    counts[T.cast(slot, "int64"), token] = counts[T.cast(slot, "int64"), token] + T.int16(1)

    return hopper.finish(sample, f"sample_{vocab}", (), early)


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    """What the host's sampler draws: int32 [n], -1 for logits that are not finite. The token counts are left as they are."""
    logits, draws, positions, counts = arrays[:4]
    return np.array(
        [
            draw_token(sample_stats.penalized(logits, record, counts), record, int(position))
            for record, position in zip(draws, positions, strict=True)
        ],
        np.int32,
    )


def draw_token(values: np.ndarray, record: np.ndarray, position: int) -> int:
    """The token of one draw from its penalized logits [vocab]."""
    if not np.isfinite(values.max()):
        return -1
    floats, words = record.view(np.float32), record.view(np.uint32)
    params = SamplingParams(
        temperature=float(floats[FIELD["temperature"]]),
        top_k=int(record[FIELD["top_k"]]),
        top_p=float(floats[FIELD["top_p"]]),
        min_p=float(floats[FIELD["min_p"]]),
    )
    if params.temperature == 0:
        return int(values.argmax())
    ids, weights = candidates(values.astype(np.float32), params)
    total = np.cumsum(weights, dtype=np.float64)
    seed = int(words[FIELD["seed_low"]]) | int(words[FIELD["seed_high"]]) << 32
    point = uniform(seed, int(words[FIELD["stream"]]), position) * total[-1]
    return int(ids[min(int(np.searchsorted(total, point, side="right")), len(ids) - 1)])


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """Every logit once."""
    n, vocab = symbols["n"], int(call.args[0].shape[1])
    return 4 * n * vocab, 4 * n * vocab
