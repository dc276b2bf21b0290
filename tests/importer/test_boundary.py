"""Masks are read off the functions transformers composes; experts by what their gating computes."""

from __future__ import annotations

import torch
from transformers import masking_utils

from llmc.importer import boundary


def test_masks_are_read_from_their_parts() -> None:
    positions = torch.zeros((1, 4), dtype=torch.long)
    causal = masking_utils.causal_mask_function
    assert boundary.read_mask(causal) == boundary.MaskRule()
    sliding = masking_utils.sliding_window_causal_mask_function(7)
    assert boundary.read_mask(sliding) == boundary.MaskRule(window=7)
    chunked = masking_utils.chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.long))
    assert boundary.read_mask(chunked) == boundary.MaskRule(chunk=5)
    packed = masking_utils.packed_sequence_compatibility_function(sliding, positions, positions)
    assert boundary.read_mask(packed) == boundary.MaskRule(window=7)


def test_masks_without_a_paged_meaning_are_refused() -> None:
    assert "not causal" in boundary.read_mask(masking_utils.bidirectional_mask_function).problem or "made by" in (
        boundary.read_mask(masking_utils.bidirectional_mask_function).problem
    )
    prefix = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    assert boundary.read_mask(prefix).problem
    blocks = masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.zeros((1, 4), dtype=torch.long))
    )
    assert "blockwise_overlay" in boundary.read_mask(blocks).problem


class _Experts(torch.nn.Module):
    has_gate = True
    has_post_expert_norm = False

    def __init__(self, gate: object) -> None:
        super().__init__()
        self._apply_gate = gate


def test_gating_is_recognised_by_value() -> None:
    def halves(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    def pairs(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x[..., 0::2]) * x[..., 1::2]

    def clipped(x: torch.Tensor) -> torch.Tensor:
        gate, up = x[..., 0::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    def one_sided(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate.clamp(max=1.0)) * up

    found = []
    for gate in (halves, pairs, clipped, one_sided):
        module = _Experts(gate)
        boundary.describe_experts(module)
        found.append(getattr(module, boundary._ATTRIBUTE))
    assert found == [
        boundary.ExpertsRule("gelu_tanh", False),
        boundary.ExpertsRule("silu", True),
        boundary.ExpertsRule("silu", True, alpha=1.702, limit=7.0, offset=1.0),
        boundary.ExpertsRule(boundary.UNKNOWN),
    ]
