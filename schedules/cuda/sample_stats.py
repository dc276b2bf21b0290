"""``llmc.sample_stats``: what choosing a token needs to know of a row of logits, found by many thread blocks at once.

For each draw and each chunk of the vocabulary: the largest logit after penalties and where it is (the lowest index among
equals), the smallest one that is not -inf, and whether one of them is no number. Floats are stored as their bits.

Penalties (:class:`llmc.runtime.sampling.SamplingParams`) are applied where a logit is read, here and in the draw itself: a row of
logits may serve several draws, and stays as the model gave it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import tirx as T

from llmc.runtime.draws import FIELD, FIELDS, MOST
from llmc.schedules.cuda import hopper
from llmc.schedules.protocol import KernelCall, TensorSpec
from llmc.targets import dependent_launch
from llmc.targets.base import Target

NAME = "cuda.sample_stats"
OP = "llmc.sample_stats"
CHUNK = 4096
"""Logits of one thread block."""

THREADS = 256
WIDTH = 4
"""Values of one chunk: bits of the maximum, its index, bits of the minimum, 1 if there is a NaN."""

WARPS = THREADS // 32
EACH = CHUNK // THREADS
INFINITE = 0x7F800000
"""The bits of infinity; NaNs are above."""

LARGEST = float(np.finfo(np.float32).max)


def _call(vocab: int) -> KernelCall:
    args = (
        TensorSpec(("r", vocab), "float32"),
        TensorSpec(("n", len(FIELDS)), "int32"),
        TensorSpec(("slots", vocab), "int16"),
    )
    return KernelCall(OP, args, TensorSpec(("n", -(-vocab // CHUNK), WIDTH), "int32"), (), "sample")


SHAPES: dict[str, KernelCall] = {
    "vocabulary_32000": _call(32000),
    "vocabulary_128256": _call(128256),
    "vocabulary_262144": _call(262144),
    "vocabulary_50257": _call(50257),
    "vocabulary_37": _call(37),
}


def matches(call: KernelCall, target: Target) -> str | None:
    if call.op != OP or target.kind != "cuda" or call.args[0].dtype != "float32":
        return None
    return f"a thread block for each {CHUNK} logits"


def space(call: KernelCall, target: Target) -> dict[str, list[Any]]:
    return {}


def magnitude(value: Any) -> Any:
    """The bits of a float32 without its sign. (TVM simplifies ``x != x`` away.)"""
    return T.bitwise_and(T.reinterpret("int32", value), 0x7FFFFFFF)


@T.inline
def penalize(value: Any, count: Any, repetition: Any, presence: Any, frequency: Any) -> None:
    """value[0] after the penalties for a token with ``count`` (int32; the sign says that it is in the prompt)."""
    if count != 0:
        generated: T.int32 = T.bitwise_and(count, MOST)
        if value[0] > T.float32(0):
            value[0] = value[0] / repetition
        else:
            value[0] = value[0] * repetition
        if generated > 0:
            value[0] = value[0] - presence
        value[0] = value[0] - frequency * T.cast(generated, "float32")


@T.inline
def merge(found: Any, index: Any, low: Any, other: Any, other_index: Any, other_low: Any) -> None:
    if other > found[0] or (other == found[0] and other_index < index[0]):
        found[0] = other
        index[0] = other_index
    low[0] = T.min(low[0], other_low)


def build(call: KernelCall, target: Target, config: dict[str, Any]) -> Any:
    vocab = int(call.args[0].shape[1])
    chunks = -(-vocab // CHUNK)
    repetition_at, presence_at, frequency_at = (FIELD[f"{p}_penalty"] for p in ("repetition", "presence", "frequency"))
    early = dependent_launch.supported(target.mcpu)
    slot_at, row_at, fields = FIELD["slot"], FIELD["row"], len(FIELDS)

    @T.prim_func
    def sample_stats(logits_ptr: T.handle, draws_ptr: T.handle, counts_ptr: T.handle, out_ptr: T.handle) -> None:
        rows = T.int64()
        n = T.int64()
        slots = T.int64()
        logits = T.match_buffer(logits_ptr, (rows, vocab), "float32", align=4)
        draws = T.match_buffer(draws_ptr, (n, fields), "int32", align=4)
        counts = T.match_buffer(counts_ptr, (slots, vocab), "int16", align=2)
        out = T.match_buffer(out_ptr, (n, chunks, WIDTH), "int32", align=4)
        T.device_entry()
        chunk, draw = T.cta_id([chunks, T.cast(n, "int32")])
        thread = T.thread_id([THREADS])
        if early:
            T.ptx.griddepcontrol.launch_dependents()
            T.ptx.griddepcontrol.wait()
        maxima = T.alloc_buffer((WARPS,), "float32", scope="shared", align=16)
        places = T.alloc_buffer((WARPS,), "int32", scope="shared", align=16)
        minima = T.alloc_buffer((WARPS,), "float32", scope="shared", align=16)
        broken = T.alloc_buffer((1,), "int32", scope="shared", align=16)
        held = T.alloc_local((EACH,), "float32")
        found = T.alloc_local((1,), "float32")
        value = T.alloc_local((1,), "float32")
        low = T.alloc_local((1,), "float32")
        index = T.alloc_local((1,), "int32")
        nan = T.alloc_local((1,), "int32")
        row: T.int64 = T.cast(draws[draw, row_at], "int64")
        slot: T.int32 = draws[draw, slot_at]
        repetition: T.float32 = T.reinterpret("float32", draws[draw, repetition_at])
        presence: T.float32 = T.reinterpret("float32", draws[draw, presence_at])
        frequency: T.float32 = T.reinterpret("float32", draws[draw, frequency_at])
        start: T.int32 = chunk * CHUNK + thread
        found[0] = T.float32(float("-inf"))
        low[0] = T.float32(LARGEST)
        index[0] = vocab
        nan[0] = 0
        if thread == 0:
            broken[0] = 0
        for i in T.unroll(EACH):
            held[i] = T.float32(float("-inf"))
            if start + i * THREADS < vocab:
                held[i] = logits[row, start + i * THREADS]
        for i in T.unroll(EACH):
            if start + i * THREADS < vocab:
                value[0] = held[i]
                if slot >= 0:
                    penalize(
                        value, T.cast(counts[T.cast(slot, "int64"), start + i * THREADS], "int32"), repetition, presence, frequency
                    )
                if magnitude(value[0]) > INFINITE:
                    nan[0] = 1
                    value[0] = T.float32(float("-inf"))
                if value[0] > found[0] or index[0] == vocab:
                    found[0] = value[0]
                    index[0] = start + i * THREADS
                if value[0] > T.float32(float("-inf")):
                    low[0] = T.min(low[0], value[0])
        for step in T.unroll(5):
            other: T.float32 = hopper.exchange(found[0], 16 >> step)
            other_index: T.int32 = hopper.exchange(index[0], 16 >> step)
            other_low: T.float32 = hopper.exchange(low[0], 16 >> step)
            merge(found, index, low, other, other_index, other_low)
        T.cuda.cta_sync()
        if thread % 32 == 0:
            maxima[thread // 32] = found[0]
            places[thread // 32] = index[0]
            minima[thread // 32] = low[0]
        if nan[0] != 0:
            broken[0] = 1
        T.cuda.cta_sync()
        if thread == 0:
            for w in T.unroll(WARPS):
                merge(found, index, low, maxima[w], places[w], minima[w])
            out[draw, chunk, 0] = T.reinterpret("int32", found[0])
            out[draw, chunk, 1] = index[0]
            out[draw, chunk, 2] = T.reinterpret("int32", low[0])
            out[draw, chunk, 3] = broken[0]

    return hopper.finish(sample_stats, f"sample_stats_{vocab}", (), early)


def penalized(logits: np.ndarray, record: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The logits of one draw after penalties, float32 [vocab], by the formulas of :class:`llmc.runtime.sampling.SamplingParams`."""
    floats = record.view(np.float32)
    row, slot = record[FIELD["row"]], record[FIELD["slot"]]
    values = logits[row].astype(np.float32)
    if slot < 0:
        return values
    count = counts[slot].astype(np.int32)
    generated = count & MOST
    repetition = floats[FIELD["repetition_penalty"]]
    scaled = np.where(values > 0, values / repetition, values * repetition)
    values = np.where(count != 0, scaled, values)
    return values - floats[FIELD["presence_penalty"]] * (generated > 0) - floats[FIELD["frequency_penalty"]] * generated


def reference(call: KernelCall, *arrays: np.ndarray) -> np.ndarray:
    logits, draws, counts = arrays
    out = np.empty(call.result.bind({"n": len(draws)}), np.int32)
    for i, record in enumerate(draws):
        values = penalized(logits, record, counts).astype(np.float32)
        for c in range(out.shape[1]):
            given = values[c * CHUNK : (c + 1) * CHUNK]
            part = np.where(np.isnan(given), np.float32(-np.inf), given)
            finite = part[part > -np.inf]
            low = finite.min(initial=np.float32(LARGEST))
            bits = np.array([part.max(), low], np.float32).view(np.int32)
            out[i, c] = bits[0], c * CHUNK + int(part.argmax()), bits[1], int(np.isnan(given).any())
    return out


def roofline(call: KernelCall, **symbols: int) -> tuple[int, int]:
    """Bytes and comparisons without penalties."""
    n, vocab = symbols["n"], int(call.args[0].shape[1])
    return 4 * n * (vocab + WIDTH * -(-vocab // CHUNK)), 2 * n * vocab
