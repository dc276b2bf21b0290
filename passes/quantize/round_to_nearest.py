"""Round-to-nearest quantization, with the clipping of each group searched for the least squared error.

For a group w of a row and candidate clippings r, codes are q = round(w / (r · s)), clamped; the scale that then fits best is the
regression of w on q, ``Σ w q / Σ q²``, with error ``Σ w² - (Σ w q)² / Σ q²``. The candidate with the least error gives the scale,
which is rounded to its storage dtype before the codes are taken for good. A symmetric code reaches one further on the negative
side, so s carries the sign that puts the largest value there (as in GGUF's Q4_0). A minimum is fitted with the scale, by the
regression with an intercept.

An error in a column that sees large activations matters more. With the second moments of a layer's inputs (``importance``, the
diagonal of Σ x xᵀ) every sum above is weighted by them, which takes the least expected squared error of the layer's result as far
as its inputs are uncorrelated; this is the clipping of AWQ (arXiv:2306.00978, which searches it) in closed form.

Matrices are quantized some rows at a time on all cores: memory is the matrix, its codes, and a few MB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from llmc.errors import InternalError
from llmc.passes.quantize.scheme import E4M3_MAX, QuantizedTensor, Scheme, concatenated, floats, stored

CLIPPINGS = (1.0, 1.12, 1.06, 0.94, 0.88, 0.82, 0.76, 0.7)
"""Candidates, as a part of the scale that just holds the largest value."""
FINE = (1.0,)
"""Candidates where a code has 7 bits or more: clipping gains nothing."""
CHUNK = 1 << 18
"""Elements that a thread quantizes at a time: they stay in a cache."""
TINY = np.float32(1e-30)


@dataclass(frozen=True)
class _How:
    """``clippings``: the candidates. ``importance``: float32 [groups, group], or None for columns that count alike."""

    scheme: Scheme
    clippings: Sequence[float]
    importance: np.ndarray | None

    def weighted(self, x: np.ndarray) -> np.ndarray:
        """``x`` [rows, groups, group] times the importance of its columns."""
        return x if self.importance is None else x * self.importance


def quantize(
    weight: np.ndarray, scheme: Scheme, importance: np.ndarray | None = None, *, clippings: Sequence[float] | None = None
) -> QuantizedTensor:
    """``weight`` [o, k], any float dtype, rounded to ``scheme``, which has one level of scales.

    ``importance``: [k], not negative, how much an error in each column counts. ``clippings``: other candidates than the scheme's.
    """
    if scheme.super_group:
        raise InternalError(f"weights are not rounded to {scheme.name}: it is a scheme of files")
    o, k = weight.shape
    given = _shared_scales(weight, scheme) if scheme.rows != 1 else None
    step = max(1, CHUNK // max(1, k))
    how = _How(scheme, clippings or (FINE if scheme.bits >= 7 else CLIPPINGS), _grouped_importance(importance, scheme, k))

    def rows(start: int) -> QuantizedTensor:
        part = np.ascontiguousarray(weight[start : start + step], dtype=np.float32)
        scales = None if given is None else given[start : start + step]
        return _rows(part, how, scales)

    starts = range(0, o, step)
    if len(starts) < 2:
        return concatenated([rows(start) for start in starts])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return concatenated(list(pool.map(rows, starts)))


def _grouped_importance(importance: np.ndarray | None, scheme: Scheme, k: int) -> np.ndarray | None:
    """[k] as [groups, group] with a mean of 1; a thousandth of that is added, so that columns never seen still get a code."""
    if importance is None:
        return None
    groups = scheme.groups(k)
    mean = max(float(importance.mean()), 1e-30)
    padded = np.pad(importance / mean + 1e-3, (0, groups * (scheme.group or k) - k))
    return padded.reshape(groups, -1).astype(np.float32)


def _rows(weight: np.ndarray, how: _How, scales: np.ndarray | None) -> QuantizedTensor:
    o, k = weight.shape
    scheme = how.scheme
    group = scheme.group or k
    groups = scheme.groups(k)
    if pad := groups * group - k:
        weight = np.pad(weight, ((0, 0), (0, pad)), mode="edge")
    grouped = weight.reshape(o, groups, group)
    with np.errstate(over="ignore", under="ignore"):
        if scheme.kind == "fp8_e4m3":
            codes, found, offsets = _fp8(grouped, scheme, scales)
        else:
            by_offset = {"minimum": _minimum, "zero_point": _zero_point, "none": _symmetric}[scheme.offset]
            codes, found, offsets = (_mx if scheme.kind == "fp4_e2m1" else by_offset)(grouped, how)
    codes = np.ascontiguousarray(codes.reshape(o, -1)[:, :k])
    return QuantizedTensor(
        scheme,
        codes,
        found,
        zeros=offsets if scheme.offset == "zero_point" else None,
        minima=offsets if scheme.offset == "minimum" else None,
    )


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, 0 where the scale is 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > TINY)


def encoder(scheme: Scheme) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A function from scaled weights to the nearest code's value (float32) and the codes (uint8)."""
    values = scheme.values()
    if scheme.kind == "int":
        low, high = values[0], values[-1]

        def integers(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            np.clip(np.rint(x, out=x), low, high, out=x)
            return x, (x - low).astype(np.uint8)

        return integers
    order = np.argsort(values, kind="stable").astype(np.uint8)
    ascending = values[order]
    edges = (ascending[1:] + ascending[:-1]) / 2

    def nearest(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = np.searchsorted(edges, x)
        return ascending[index], order[index]

    return nearest


def _symmetric(w: np.ndarray, how: _How) -> tuple[np.ndarray, np.ndarray, None]:
    scheme = how.scheme
    encode, values = encoder(scheme), scheme.values()
    at = np.abs(w).argmax(axis=2)[:, :, None]
    extreme = np.take_along_axis(w, at, axis=2)[:, :, 0]
    base = extreme / values[np.abs(values).argmax()]
    best, gain = base, np.full(base.shape, -1, np.float32)
    for r in how.clippings if len(how.clippings) > 1 else ():
        q, _ = encode(w * _inverse(base * np.float32(r))[:, :, None])
        hq = how.weighted(q)
        wq, qq = np.einsum("ogi,ogi->og", w, hq), np.einsum("ogi,ogi->og", q, hq)
        explained = wq * wq * _inverse(qq)
        better = explained > gain
        best = np.where(better, wq * _inverse(qq), best)
        gain = np.where(better, explained, gain)
    scales = stored(best, scheme.scale_dtype)
    _, codes = encode(w * _inverse(floats(scales, scheme.scale_dtype))[:, :, None])
    return codes, scales, None


def _minimum(w: np.ndarray, how: _How) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scheme = how.scheme
    top = np.float32((1 << scheme.bits) - 1)
    low, high = w.min(axis=2), w.max(axis=2)
    middle, half = (low + high) / 2, (high - low) / 2
    n = np.float32(w.shape[2]) if how.importance is None else how.importance.sum(axis=1)
    best, start = (high - low) / top, low
    least = np.full(low.shape, np.inf, np.float32)
    mean_w = how.weighted(w).sum(axis=2) / n
    centred = w - mean_w[:, :, None]
    hw = how.weighted(centred)
    sum_ww = np.einsum("ogi,ogi->og", centred, hw)
    for r in how.clippings:
        if r > 1:
            continue
        scale, origin = 2 * half * np.float32(r) / top, middle - half * np.float32(r)
        q = np.clip(np.rint((w - origin[:, :, None]) * _inverse(scale)[:, :, None]), 0, top)
        mean_q = how.weighted(q).sum(axis=2) / n
        q -= mean_q[:, :, None]
        sum_wq = np.einsum("ogi,ogi->og", hw, q)
        slope = sum_wq * _inverse(np.einsum("ogi,ogi->og", q, how.weighted(q)))
        intercept = mean_w - slope * mean_q
        error = sum_ww - slope * sum_wq
        better = (error < least) & (slope > 0)
        best, start = np.where(better, slope, best), np.where(better, intercept, start)
        least = np.where(better, error, least)
    scales, minima = stored(best, scheme.scale_dtype), stored(start, scheme.scale_dtype)
    scale, origin = floats(scales, scheme.scale_dtype), floats(minima, scheme.scale_dtype)
    codes = np.clip(np.rint((w - origin[:, :, None]) * _inverse(scale)[:, :, None]), 0, top).astype(np.uint8)
    return codes, scales, minima


def _zero_point(w: np.ndarray, how: _How) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scheme = how.scheme
    top = np.float32((1 << scheme.bits) - 1)
    low, high = np.minimum(w.min(axis=2), 0), np.maximum(w.max(axis=2), 0)  # zero lies on the grid
    base = (high - low) / top
    best, zeros = base, np.clip(np.rint(-low * _inverse(base)), 0, top)
    gain = np.full(low.shape, -1, np.float32)
    for r in how.clippings:
        if r > 1:
            continue
        scale = base * np.float32(r)
        zero = np.clip(np.rint(-low * np.float32(r) * _inverse(scale)), 0, top)
        q = np.clip(np.rint(w * _inverse(scale)[:, :, None]) + zero[:, :, None], 0, top) - zero[:, :, None]
        hq = how.weighted(q)
        wq, qq = np.einsum("ogi,ogi->og", w, hq), np.einsum("ogi,ogi->og", q, hq)
        explained = wq * wq * _inverse(qq)
        better = (explained > gain) & (wq > 0)
        best, zeros = np.where(better, wq * _inverse(qq), best), np.where(better, zero, zeros)
        gain = np.where(better, explained, gain)
    scales = stored(best, scheme.scale_dtype)
    inverse = _inverse(floats(scales, scheme.scale_dtype))[:, :, None]
    codes = np.clip(np.rint(w * inverse) + zeros[:, :, None], 0, top).astype(np.uint8)
    return codes, scales, zeros.astype(np.uint8)


def _mx(w: np.ndarray, how: _How) -> tuple[np.ndarray, np.ndarray, None]:
    """The power of two that OCP's MX specification takes, 2^(floor(log2 max) - 2), or the next one if its error is less."""
    encode = encoder(how.scheme)
    largest = np.maximum(np.abs(w).max(axis=2), np.float32(2.0**-120))
    _, exponent = np.frexp(largest)
    first = np.ldexp(np.float32(1), exponent - 1 - 2)
    errors = []
    for scale in (first, first * 2):
        q, _ = encode(w * _inverse(scale)[:, :, None])
        difference = q * scale[:, :, None] - w
        errors.append(np.einsum("ogi,ogi->og", difference, how.weighted(difference)))
    best = np.where(errors[1] < errors[0], first * 2, first)
    _, codes = encode(w * _inverse(best)[:, :, None])
    return codes, stored(best, how.scheme.scale_dtype), None


def _fp8(w: np.ndarray, scheme: Scheme, given: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, None]:
    largest = np.abs(w).max(axis=2) if given is None else given * np.float32(E4M3_MAX)
    scales = stored(largest / np.float32(E4M3_MAX), scheme.scale_dtype)
    scaled = np.clip(w * _inverse(floats(scales, scheme.scale_dtype))[:, :, None], -E4M3_MAX, E4M3_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scales, None


def _shared_scales(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Scales [o, groups] that several rows share, from the largest value in their block."""
    o, k = weight.shape
    rows, group, groups = scheme.rows or o, scheme.group or k, scheme.groups(k)
    scales = np.zeros((o, groups), np.float32)
    for start in range(0, o, rows):
        block = np.abs(weight[start : start + rows].astype(np.float32)).max(axis=0)
        block = np.pad(block, (0, groups * group - k)).reshape(groups, group).max(axis=1)
        scales[start : start + rows] = block / np.float32(E4M3_MAX)
    return scales
