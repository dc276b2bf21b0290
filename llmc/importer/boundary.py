"""The ops at which exporting stops: attention, its mask, and expert dispatch.

transformers lets a caller register an attention function, a mask function and an experts function by name. Ours are opaque
torch custom ops, so ``torch.export`` keeps each as one node whatever model it is in, and no architecture needs a line of code.

- A mask is never computed: the mask function returns a *marker*, a ``llmc::mask`` node whose arguments say which positions a row
  may see (window, chunk). They are read off the mask function transformers composed, by the functions it is made of; a part
  that is not known makes the marker unsupported, and the walker reports it.
- An experts module is described by numbers, not by its class: which activation and which gate layout reproduce its own
  ``_apply_gate`` on random input is found by trying the known ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import torch

from llmc.dialect.linear import ACTIVATIONS
from llmc.dialect.moe import gate

INTERFACE = "llmc"
"""The name our functions are registered under in transformers' attention, mask and experts interfaces."""

UNKNOWN = "unknown"


@torch.library.custom_op("llmc::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    problem: str,
) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@_attention.register_fake
def _(q, k, v, mask, sinks, scale, softcap, problem):
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@torch.library.custom_op("llmc::mask", mutates_args=())
def _mask(ref: torch.Tensor, rows: int, columns: int, window: int, chunk: int, problem: str) -> torch.Tensor:
    return ref.new_empty((1, 1, rows, columns), dtype=torch.bool)


@_mask.register_fake
def _(ref, rows, columns, window, chunk, problem):
    return ref.new_empty((1, 1, rows, columns), dtype=torch.bool)


@torch.library.custom_op("llmc::moe", mutates_args=())
def _moe(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    transposed: bool,
    interleave: bool,
    alpha: float,
    limit: float,
    offset: float,
) -> torch.Tensor:
    return torch.empty_like(x)


@_moe.register_fake
def _(x, *_):
    return torch.empty_like(x)


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q [1, hq, s, d], k and v [1, hk, s, d] -> ([1, s, hq, dv], None).

    ``kwargs`` holds what flash implementations need and the mask already says (``sliding_window``); an unknown *tensor* in it
    would change the result, so it is handed on as a problem for the report.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    problem = ""
    if attention_mask is None and not causal:
        problem = "bidirectional attention"
    known = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"}
    extra = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and k not in known]
    if extra:
        problem = f"attention with the extra operand {', '.join(sorted(extra))}"
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    out = torch.ops.llmc.attention(query, key, value, attention_mask, s_aux, scale, float(softcap or 0.0), problem)
    return out, None


# What transformers composes masks of: the defining function's name -> what it adds. The packed-sequence and padding parts hold
# for every token of a packed batch: sequences never see each other there, which paged attention guarantees by construction.
_NEUTRAL = {
    "and_masks",
    "causal_mask_function",
    "padding_mask_function",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "packed_sequence_compatibility_function",
    "add_offsets_to_mask_function",
}


def _parts(function: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mask function ``function`` is composed of: the name of the function that made it, and its closure's values."""
    if not isinstance(function, FunctionType):
        yield UNKNOWN, {}
        return
    cells = {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)}
    yield function.__qualname__.split(".")[0], cells
    for value in cells.values():
        inner = value if isinstance(value, tuple | list) else [value]
        for item in inner:
            if isinstance(item, FunctionType):
                yield from _parts(item)


@dataclass(frozen=True)
class MaskRule:
    """Which positions a row may see; see ``llmc.dialect.attention`` for window and chunk (-1: no limit)."""

    window: int = -1
    chunk: int = -1
    problem: str = ""


def read_mask(function: Any) -> MaskRule:
    """The rule that a composed mask function expresses; ``problem`` names the first part that has no meaning here."""
    window = chunk = -1
    causal = False
    for name, cells in _parts(function):
        if name == "sliding_window_overlay":
            window = int(cells["sliding_window"])
        elif name == "chunked_overlay":
            chunk = int(cells["chunk_size"])
        elif name not in _NEUTRAL:
            return MaskRule(problem=f"attention mask made by {name}")
        causal |= name == "causal_mask_function"
    if not causal:
        return MaskRule(problem="attention mask that is not causal")
    return MaskRule(window, chunk)


def mask_function(
    *, q_length: int, kv_length: int, mask_function: Any, config: Any = None, device: Any = None, **_: Any
) -> torch.Tensor:
    """transformers' mask interface: a marker that stands for the mask."""
    rule = read_mask(mask_function)
    ref = torch.empty((), device=device if device is not None else "meta")
    return torch.ops.llmc.mask(ref, q_length, kv_length, rule.window, rule.chunk, rule.problem)


@dataclass(frozen=True)
class ExpertsRule:
    """How an experts module combines gate and up: see ``llmc.dialect.moe``. ``activation`` is UNKNOWN if no known one fits."""

    activation: str
    interleave: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0


_ATTRIBUTE = "_llmc_experts_rule"


def _probe_experts(module: Any) -> ExpertsRule:
    """Find the rule that reproduces the module's own gating on random values."""
    with torch.no_grad():
        if not module.has_gate:
            return _probe_activation(lambda x: module.act_fn(torch.from_numpy(x)).double().numpy())

        def gating(rows: np.ndarray) -> np.ndarray:
            return module._apply_gate(torch.from_numpy(rows.astype(np.float32))).double().numpy()

        x = np.random.default_rng(0).standard_normal((64, 12)) * 6
        found = gating(x)
        for interleave in (False, True):
            g, u = (x[:, 0::2], x[:, 1::2]) if interleave else np.split(x, 2, axis=1)
            plain = [ExpertsRule(name, interleave) for name in ACTIVATIONS]
            for rule in (*plain, _clipped_rule(gating, interleave)):
                expected = gate(g, u, activation=rule.activation, alpha=rule.alpha, limit=rule.limit, offset=rule.offset)
                if expected.shape == found.shape and np.allclose(found, expected, rtol=1e-4, atol=1e-5):
                    return rule
    return ExpertsRule(UNKNOWN)


def _probe_activation(function: Callable[[np.ndarray], np.ndarray]) -> ExpertsRule:
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32) * 3
    found = function(x)
    fitting = (n for n, f in ACTIVATIONS.items() if np.allclose(found, f(x.astype(np.float64)), rtol=1e-5, atol=1e-6))
    return ExpertsRule(next(fitting, UNKNOWN))


def _clipped_rule(gating: Callable[[np.ndarray], np.ndarray], interleave: bool) -> ExpertsRule:
    """The silu gate with slope, limit and offset solved from four values, as if the module were such a gate.

    With A = sigmoid(alpha), the value at gate 1: f(1, 1) - f(1, 0) = A, f(1, 0) = offset · A, and the largest and smallest u give
    (± limit + offset) · A. The caller checks the rule on values it was not solved from.
    """

    def at(g: float, u: float) -> float:
        row = np.tile([g, u], 3) if interleave else np.repeat([g, u], 3)
        return float(gating(row[None])[0, 0])

    slope = at(1, 1) - at(1, 0)
    if not 0 < slope < 1:
        return ExpertsRule("silu", interleave)
    limit = (at(1, 1e4) - at(1, -1e4)) / (2 * slope)
    rounded = [round(v, 4) for v in (float(np.log(slope / (1 - slope))), limit if limit < 5e3 else 0.0, at(1, 0) / slope)]
    return ExpertsRule("silu", interleave, *rounded)


def describe_experts(model: torch.nn.Module) -> None:
    """Note on every experts module how it gates. Must run outside tracing, where tensors have values."""
    for module in model.modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "has_gate"):
            rule = ExpertsRule(UNKNOWN) if module.has_post_expert_norm else _probe_experts(module)
            object.__setattr__(module, _ATTRIBUTE, rule)


def experts_function(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: x [n, h], ids [n, t], weights [n, t] -> [n, h]."""
    rule: ExpertsRule = getattr(module, _ATTRIBUTE)
    up, up_bias = ("gate_up_proj", "gate_up_proj_bias") if module.has_gate else ("up_proj", "up_proj_bias")
    return torch.ops.llmc.moe(
        hidden_states,
        top_k_index,
        top_k_weights,
        getattr(module, up),
        module.down_proj,
        getattr(module, up_bias) if module.has_bias else None,
        module.down_proj_bias if module.has_bias else None,
        rule.activation,
        bool(module.has_gate),
        bool(module.is_transposed),
        rule.interleave,
        rule.alpha,
        rule.limit,
        rule.offset,
    )


def register() -> None:
    """Make the interface name known to transformers; registering twice is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(INTERFACE, attention_function)
    AttentionMaskInterface.register(INTERFACE, mask_function)
    ExpertsInterface.register(INTERFACE, experts_function)
