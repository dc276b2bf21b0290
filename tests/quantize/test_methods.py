"""GPTQ and AWQ on small matrices, against direct implementations and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.passes.quantize.awq import awq, output_error, search
from llmc.passes.quantize.error_propagation import make_up, ridge_factor
from llmc.passes.quantize.gptq import DAMPING, gptq, walk
from llmc.passes.quantize.round_to_nearest import quantize
from llmc.passes.quantize.scheme import QuantizedTensor, floats, scheme
from llmc.passes.quantize.smoothquant import sizes, smooth

SCHEMES = ["int4_g32", "int4z_g64", "int4p_g32", "int3_g16", "nf4_g64", "int2z_g16", "int4_row"]
SIZES = [(24, 64), (17, 70), (9, 33)]
"""The last two are no multiple of the groups."""


def layer(o: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and correlated inputs [n, k] some channels of which are large."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k)
    inputs = rng.standard_normal((200, k)) @ mixing * np.exp(rng.standard_normal(k))
    return (rng.standard_normal((o, k)) * 0.1).astype(np.float32), inputs.astype(np.float32)


def brain_surgeon(weight: np.ndarray, moments: np.ndarray, grid: QuantizedTensor) -> np.ndarray:
    """Optimal brain quantization in GPTQ's order, straight from its definition in float64: after each column the inverse of the
    moments of those that are left is taken anew. The dequantized result."""
    how, (o, k) = grid.scheme, weight.shape
    group = how.group or k
    scales = np.repeat(floats(grid.scales, how.scale_dtype).astype(np.float64), group, axis=1)[:, :k]
    minima = (
        0.0 if grid.minima is None else np.repeat(floats(grid.minima, how.scale_dtype).astype(np.float64), group, axis=1)[:, :k]
    )
    zeros = 0.0 if grid.zeros is None else np.repeat(grid.zeros.astype(np.float64), group, axis=1)[:, :k]
    values = (how.values().astype(np.float64)[None, None] - np.broadcast_to(zeros, (o, k))[..., None]) * scales[..., None]
    values = values + np.broadcast_to(minima, (o, k))[..., None]
    h = moments.astype(np.float64) + np.eye(k) * DAMPING * np.diagonal(moments).mean()
    left, w, result = list(np.argsort(-np.diagonal(moments), kind="stable")), weight.astype(np.float64), np.zeros((o, k))
    while left:
        j, rest = left[0], left[1:]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        result[:, j] = np.take_along_axis(values[:, j], np.abs(values[:, j] - w[:, j, None]).argmin(1)[:, None], 1)[:, 0]
        w[:, rest] -= ((w[:, j] - result[:, j]) / inverse[0, 0])[:, None] * inverse[0, 1:]
        left = rest
    return result


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("o", "k"), SIZES)
def test_gptq_is_optimal_brain_quantization(name: str, o: int, k: int) -> None:
    weight, inputs = layer(o, k)
    moments = inputs.T @ inputs
    found = gptq(weight, walk(moments), scheme(name))
    grid = quantize(weight, scheme(name), np.diagonal(moments))
    expected = brain_surgeon(weight, moments, grid)
    np.testing.assert_array_equal(found.scales, grid.scales)
    ours, theirs = (np.linalg.norm((q - weight) @ inputs.T) for q in (found.dequantize(), expected))
    assert ours == pytest.approx(theirs, rel=2e-2)
    # a value halfway between two codes may fall to either side in float32, and the columns after it then differ
    rows = np.isclose(found.dequantize(), expected, atol=1e-5).all(axis=1)
    assert rows.mean() > 0.85


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("o", "k"), SIZES)
def test_gptq_beats_rounding_to_nearest(name: str, o: int, k: int) -> None:
    weight, inputs = layer(o, k, seed=1)
    moments = inputs.T @ inputs
    found = gptq(weight, walk(moments), scheme(name))
    assert found.codes.shape == (o, k) and int(found.codes.max()) < 1 << found.scheme.bits
    plain = output_error(weight, quantize(weight, scheme(name)).dequantize(), moments)
    assert output_error(weight, found.dequantize(), moments) < 0.6 * plain
    direct = float(np.linalg.norm((found.dequantize() - weight).astype(np.float64) @ inputs.T) ** 2)
    assert output_error(weight, found.dequantize(), moments) == pytest.approx(direct, rel=1e-3)


def test_gptq_takes_dead_and_equal_columns() -> None:
    """Inputs that never fire, and moments without full rank."""
    weight, inputs = layer(8, 32)
    inputs[:, 5] = 0
    inputs[:, 7] = inputs[:, 6]
    found = gptq(weight, walk(inputs.T @ inputs), scheme("int4_g32")).dequantize()
    assert np.isfinite(found).all()
    assert np.abs(found[:, 5] - weight[:, 5]).max() < 0.2
    assert np.isfinite(gptq(weight, walk(np.zeros((32, 32), np.float32)), scheme("int4_g32")).dequantize()).all()


@pytest.mark.parametrize(("o", "k"), SIZES)
def test_weights_make_up_for_changed_inputs(o: int, k: int) -> None:
    """The whole step is the ridge regression of the meant results on the seen inputs, from its definition in float64."""
    weight, meant = layer(o, k, seed=4)
    seen = meant + 0.1 * np.random.default_rng(5).standard_normal(meant.shape).astype(np.float32) @ np.abs(np.diag(meant[0]))
    moments, change = seen.T @ seen, (meant - seen).T @ seen
    damping = np.sqrt(0.2 * np.diagonal(moments).mean())
    rows = np.concatenate([seen, damping * np.eye(k)]).astype(np.float64)
    wanted = np.concatenate([meant @ weight.T, damping * weight.T]).astype(np.float64)
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    found = make_up(weight, ridge_factor(moments, 0.2), change, share=1.0)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    half = make_up(weight, ridge_factor(moments, 0.2), change)
    np.testing.assert_allclose(half, (found + weight) / 2, atol=1e-6)
    wrong = [np.linalg.norm(seen @ w.T - meant @ weight.T) for w in (weight, half, found)]
    assert wrong[2] < wrong[1] < wrong[0]
    unseen = np.zeros_like(moments)
    np.testing.assert_array_equal(make_up(weight, ridge_factor(unseen), unseen), weight)


@pytest.mark.parametrize("name", ["int4_g32", "int4z_g64", "int3_g16"])
@pytest.mark.parametrize(("o", "k"), SIZES)
def test_awq_beats_rounding_to_nearest(name: str, o: int, k: int) -> None:
    weight, inputs = layer(o, k, seed=2)
    moments = inputs.T @ inputs
    s, gain = search([(weight, scheme(name))], moments)
    assert s.shape == (k,) and s.dtype == np.float32 and (s > 0).all() and gain < 1
    scaled = awq(weight, s, moments, scheme(name)).dequantize()
    exact = (inputs @ weight.T).astype(np.float64)
    error = np.linalg.norm((inputs / s) @ scaled.T - exact)
    plain = np.linalg.norm(inputs @ quantize(weight, scheme(name)).dequantize().T - exact)
    assert error < 0.85 * plain


def test_awq_shares_scales_and_finds_nothing_to_gain_in_equal_channels() -> None:
    weight, inputs = layer(16, 64)
    s, _ = search([(weight, scheme("int4_g32")), (weight[:3], scheme("int3_g16"))], inputs.T @ inputs)
    assert s.shape == (64,)
    s, gain = search([(weight, scheme("int4_g32"))], np.eye(64, dtype=np.float32))
    assert gain == 1 and (s == 1).all()


@pytest.mark.parametrize("name", ["int4_g32", "int4z_g64", "int4p_g32", "int3_g16", "mxfp4", "nf4_g64"])
@pytest.mark.parametrize(("o", "k"), SIZES)
def test_importance_lowers_the_weighted_error(name: str, o: int, k: int) -> None:
    weight, _ = layer(o, k, seed=3)
    importance = np.exp(2 * np.random.default_rng(4).standard_normal(k)).astype(np.float32)
    plain, weighted = quantize(weight, scheme(name)), quantize(weight, scheme(name), importance)
    errors = [float((importance * (q.dequantize() - weight) ** 2).sum()) for q in (plain, weighted)]
    assert errors[1] < errors[0] if name != "mxfp4" else errors[1] <= errors[0]
    flat = quantize(weight, scheme(name), np.full(k, 7.0, np.float32))
    assert np.linalg.norm(flat.dequantize() - weight) <= 1.001 * np.linalg.norm(plain.dequantize() - weight)


@pytest.mark.parametrize(("o", "k"), SIZES)
def test_smoothquant_lowers_the_error_of_eight_bit_activations(o: int, k: int) -> None:
    weight, inputs = layer(o, k, seed=5)
    inputs[0] *= 1000  # one token that is as large as all others together
    both = [weight, weight[:2] * 3]
    s = smooth(both, sizes(inputs))
    size = np.sqrt(np.mean([np.square(x / np.linalg.norm(x)) for x in inputs.astype(np.float64)], axis=0))
    expected = np.sqrt(size / np.linalg.norm(np.concatenate(both).astype(np.float64), axis=0))
    np.testing.assert_allclose(s / s[0], expected / expected[0], rtol=1e-5)
    assert np.log(s).mean() == pytest.approx(0, abs=1e-5)

    def product(scales: np.ndarray) -> np.ndarray:
        """With activations rounded to 8 bits, a scale for each token."""
        x = inputs / scales
        step = np.abs(x).max(axis=1, keepdims=True) / 127
        return np.rint(x / step) * step @ quantize(weight * scales, scheme("w8a8")).dequantize().T

    exact = (inputs @ weight.T).astype(np.float64)
    plain, smoothed = (np.linalg.norm((product(v) - exact) / np.linalg.norm(exact, axis=1)[:, None]) for v in (np.ones(k), s))
    assert smoothed < 0.8 * plain


def test_smoothquant_leaves_unused_channels_alone() -> None:
    weight, inputs = layer(4, 8)
    inputs[:, 3] = 0
    weight[:, 5] = 0
    s = smooth([weight], sizes(inputs))
    assert s[3] == s[5] == 1 and np.isfinite(s).all() and (s > 0).all()
    np.testing.assert_array_equal(smooth([weight], sizes(np.zeros_like(inputs))), np.ones(8))
