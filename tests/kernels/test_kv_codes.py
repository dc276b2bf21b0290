"""Codes of keys and values: what they lose, that rounding is to nearest, and where a page has them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llmc.dialect.kv_codes import dequantize, down, quantize, up
from llmc.dialect.paged import append_reference, gather_reference
from llmc.kv_layout import KV_DTYPES, SCHEMES, page_layout
from llmc.manifest import KvInfo, KvLayer

LARGEST_ERROR = {"int8": 0.5 / 127 * (1 + 2**-7), "fp8_e4m3": 1 / 28 * (1 + 2**-7), "int4": 0.5 / 15 * (1 + 2**-7) * 2 + 2**-8}
"""Of an element, in units of the group's largest absolute value."""


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dim", [1, 20, 57, 64, 80])
def test_round_trip(name: str, dim: int) -> None:
    scheme, rng = SCHEMES[name], np.random.default_rng(dim)
    x = (rng.standard_normal((50, 3, dim)) * 10 ** rng.uniform(-3, 3, (50, 1, 1))).astype(np.float32)
    x[0], x[1] = 0, x[1, 0, 0]
    codes, parameters = quantize(x, scheme)
    assert codes.shape == (50, 3, scheme.code_bytes(dim)) and parameters.shape == (50, 3, 2 * scheme.parameters(dim))
    found = dequantize(codes, parameters, dim, scheme)
    for first in range(0, dim, scheme.span(dim)):
        part = slice(first, min(dim, first + scheme.span(dim)))
        largest = np.abs(x[..., part]).max(axis=-1, keepdims=True)
        assert (np.abs(found - x)[..., part] <= largest * LARGEST_ERROR[name] + 1e-30).all()
    assert not found[0].any()


@pytest.mark.parametrize("name", SCHEMES)
def test_no_other_code_is_nearer(name: str) -> None:
    scheme = SCHEMES[name]
    x = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    codes, parameters = quantize(x, scheme)
    best = np.abs(dequantize(codes, parameters, 64, scheme) - x)
    for step in (1, 255, 16, 240):
        other = dequantize((codes + np.uint8(step)).astype(np.uint8), parameters, 64, scheme)
        assert (np.nan_to_num(np.abs(other - x), nan=np.inf) >= best * (1 - 1e-5) - 1e-7).all()


def test_parameters_are_rounded_outwards() -> None:
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    for rounded, values in ((up(np.abs(x)), np.abs(x)), (-down(x), -x)):
        assert (rounded >= values).all() and (np.abs(rounded - values) <= np.abs(values) * 2**-7).all()
        np.testing.assert_array_equal(rounded.astype(ml_dtypes.bfloat16).astype(np.float32), rounded)


@pytest.mark.parametrize("name", KV_DTYPES)
@pytest.mark.parametrize(("page_size", "d", "dv"), [(16, 64, 64), (3, 57, 20), (5, 1, 33)])
def test_the_parts_of_a_page_do_not_overlap(name: str, page_size: int, d: int, dv: int) -> None:
    """Every slot filled in turn: what the others hold stays."""
    rng, dtype = np.random.default_rng(2), np.uint8 if name in SCHEMES else np.float32
    layout, scheme = page_layout(name, page_size, d, dv), name if name in SCHEMES else ""
    pages = np.zeros((2, 2, layout.width), dtype)
    k, v = rng.standard_normal((2 * page_size, 2, d)), rng.standard_normal((2 * page_size, 2, dv))
    for i in rng.permutation(len(k)):
        pages = append_reference(k[i : i + 1], v[i : i + 1], np.array([i]), pages, page_size=page_size, kv_scheme=scheme)
    found = gather_reference(pages, np.arange(2), len(k), d=d, v_dim=dv, page_size=page_size, kv_scheme=scheme)
    for values, expected in zip(found, (k, v), strict=True):
        if scheme:
            expected = dequantize(*quantize(expected, SCHEMES[name]), expected.shape[-1], SCHEMES[name])
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert layout.nbytes == layout.width * pages.itemsize or name in ("float16", "bfloat16")


def test_bytes_of_a_token() -> None:
    layers = [KvLayer(8, 128, 128)] * 3
    bytes_per_token = {name: KvInfo(16, name, layers).bytes_per_token for name in KV_DTYPES}
    half = bytes_per_token["bfloat16"]
    assert half == bytes_per_token["float32"] // 2 == 3 * 8 * 256 * 2
    assert bytes_per_token["int8"] == bytes_per_token["fp8_e4m3"] == half // 2 + 3 * 8 * 2 * 2
    assert bytes_per_token["int4"] == half // 4 + 3 * 8 * 2 * 16
    assert KvInfo(16, "int8", layers).bits == 8 + 16 / 128 and KvInfo(16, "int4", layers).bits == 4 + 2 * 16 / 32
