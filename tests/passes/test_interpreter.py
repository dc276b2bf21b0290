"""The interpreter against torch: an op table that is wrong would make every other test of the passes worthless."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.dialect import interpreter
from tests.support import graphs


def _torch_forward(built: graphs.Built, ids: np.ndarray) -> np.ndarray:
    """The "grouped" case written directly in torch, float64."""
    import torch
    import torch.nn.functional as F

    c = built.config
    w = {name: torch.from_numpy(graphs.stored(built.table, name).astype(np.float64)) for name in built.table}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), w[f"{name}.weight"], 1e-6)

    n = len(ids)
    angles = torch.arange(n, dtype=torch.float64)[:, None] * w["inv_freq"][None]
    turn = torch.polar(torch.ones_like(angles), angles)

    def rope(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        z = torch.complex(a, b) * turn
        return torch.cat([z.real, z.imag], -1)

    h = w["embed"][torch.from_numpy(ids.astype(np.int64))]
    for i in range(c.layers):
        p = f"layers.{i}"
        x = norm(h, f"{p}.norm1")
        q, k, v = ((x @ w[f"{p}.attn.{s}_proj.weight"].T).view(n, -1, c.head_dim).transpose(0, 1) for s in "qkv")
        a = F.scaled_dot_product_attention(rope(q)[None], rope(k)[None], v[None], is_causal=True, enable_gqa=True)[0]
        h = h + a.transpose(0, 1).reshape(n, -1) @ w[f"{p}.attn.o_proj.weight"].T
        x = norm(h, f"{p}.norm2")
        gate, up = (x @ w[f"{p}.mlp.{s}_proj.weight"].T for s in ("gate", "up"))
        h = h + (F.silu(gate) * up) @ w[f"{p}.mlp.down_proj.weight"].T
    return (norm(h, "norm") @ w["lm_head.weight"].T).numpy()


def test_decoder_matches_torch() -> None:
    built = graphs.build(graphs.CASES["grouped"])
    given = built.inputs(9)
    found = interpreter.run(built.module, built.arguments(built.module["main"].params, given))
    np.testing.assert_allclose(found, _torch_forward(built, given["input_ids"]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", graphs.CASES)
def test_every_case_runs(case: str) -> None:
    built = graphs.build(graphs.CASES[case])
    found = interpreter.run(built.module, built.arguments(built.module["main"].params, built.inputs(5)))
    assert found.shape == (5, built.config.vocab)
    assert np.isfinite(found).all() and found.std() > 1e-3
