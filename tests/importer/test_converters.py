"""Every converter against torch: small functions of token vectors, exported, walked, and run in the NumPy interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmc.dialect import interpreter
from llmc.importer.aten import CONVERTERS, convert
from llmc.importer.export import _functional
from llmc.importer.params import Constant, ParamTable
from llmc.importer.walker import Walker

WIDTH, VOCAB, LENGTH = 12, 31, 7
Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Small(torch.nn.Module):
    """``body(x [1, s, 12], positions [1, s])`` on embedded ids."""

    def __init__(self, body: Function) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.square = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.unit = torch.nn.Parameter(torch.randn(1, WIDTH))
        self.body = body

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.body(self, x, position_ids) if self.body.__code__.co_argcount == 3 else self.body(x, position_ids)  # type: ignore[call-arg]


def walk(body: Function) -> tuple[Small, Walker, Any]:
    torch.manual_seed(0)
    model = Small(body).eval()
    length = torch.export.Dim("s", min=2, max=64)
    example = torch.zeros((1, LENGTH), dtype=torch.long), torch.arange(LENGTH)[None]
    with torch.no_grad():
        program = torch.export.export(
            model, example, dynamic_shapes={"input_ids": {1: length}, "position_ids": {1: length}}, strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )  # fmt: skip
    table = ParamTable()
    for name, value in model.named_parameters():
        table.add(name, Constant(value.detach().numpy(), name))
    walker = Walker(_functional(program), table, {}, {}, "float32", "float32", convert)
    return model, walker, walker.run()


def split_rotate(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def routed(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    values, ids = torch.topk(x.softmax(-1), 3, dim=-1)
    return torch.cat((values, ids.float(), torch.gather(x, -1, ids)), -1)


def scattered(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    ids = torch.topk(x, 2, dim=-1).indices
    return torch.zeros_like(x).scatter(-1, ids, 1.0) * x


def complex_rotation(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    angles = p[..., None].float() * torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.01])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(2)


def assigned(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(*x.shape[:-1], WIDTH)
    out[..., :5] = x[..., 7:]
    out[..., 5:] = x[..., :7]
    return out


def heads(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    q = x.view(1, -1, 3, 4).transpose(1, 2)
    return (q * 2 + q.mean(-1, keepdim=True)).permute(0, 2, 1, 3).reshape(1, -1, WIDTH)


RIGHT: dict[str, Function] = {
    "arithmetic": lambda x, p: (x + 2) * (1 - x) / (x * x + 0.5) - x.pow(3),
    "reversed": lambda x, p: 3.0 - x + 2.0 / (x.abs() + 1),
    "integers": lambda x, p: ((p * 3 + 1) // 2 % 5)[..., None].float() + x,
    "promotion": lambda x, p: p[..., None] * 0.5 + p[..., None] * 2,
    "true_division": lambda x, p: (p[..., None] / 3).expand(-1, -1, 2),
    "floor_division": lambda x, p: torch.div(x * 10, 3, rounding_mode="floor"),
    "truncated": lambda x, p: torch.div(x * 10, 3, rounding_mode="trunc"),
    "addcmul": lambda x, p: torch.addcmul(x, x, x + 1, value=0.5) + torch.lerp(x, 2 * x, 0.3),
    "alpha": lambda x, p: torch.add(x, x * x, alpha=3) - torch.sub(x, x * x, alpha=2),
    "comparisons": lambda x, p: torch.where((x > 0) & (x <= 1) | (x == x.amax(-1, keepdim=True)), x, -x),
    "masked": lambda x, p: x.masked_fill(~(x > 0), -1.0),
    "logic": lambda x, p: torch.logical_or(x > 0.5, torch.logical_not(x < -0.5)).float(),
    "unary": lambda x, p: x.exp() + x.abs().log1p() + x.sin() + x.cos() + x.tanh() + x.erf() + x.floor() + x.ceil() + x.sign(),
    "roots": lambda x, p: (x.square() + 1).sqrt() + (x.square() + 1).rsqrt() + (x.square() + 1).reciprocal() + x.expm1(),
    "activations": lambda x, p: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.relu(x) + F.mish(x) + F.leaky_relu(x),
    "soft": lambda x, p: F.softplus(3 * x) + F.logsigmoid(x) + F.relu6(8 * x) + F.hardtanh(x) + x.sigmoid(),
    "clamp": lambda x, p: x.clamp(-0.3, 0.4) + x.clamp(min=0.1) + torch.clamp_max(x, 0.2) + torch.maximum(x, -x),
    "reductions": lambda x, p: torch.cat(
        [x.sum(-1, keepdim=True), x.mean(-1, True), x.amax(-1, True), x.amin(-1, True), x.max(-1, keepdim=True).values,
         x.min(-1, True).values, x.norm(dim=-1, keepdim=True), x.logsumexp(-1, keepdim=True)], -1
    ),
    "moments": lambda x, p: torch.cat([x.var(-1, keepdim=True), x.std(-1, keepdim=True), x.var(-1, False, keepdim=True)], -1),
    "arguments": lambda x, p: torch.stack([x.argmax(-1), x.argmin(-1), x.max(-1).indices], -1).float(),
    "any_all": lambda x, p: torch.stack([(x > 1).any(-1), (x > -3).all(-1)], -1).float(),
    "middle": lambda x, p: x.view(1, -1, 3, 4).sum(2) + x.view(1, -1, 3, 4).mean((2, 3)).unsqueeze(-1),
    "softmax": lambda x, p: x.softmax(-1) + x.log_softmax(-1) + x.view(1, -1, 3, 4).softmax(2).flatten(2),
    "cumulative": lambda x, p: x.cumsum(-1),
    "heads": heads,
    "rotate": split_rotate,
    "slices": lambda x, p: torch.cat([x[..., 2:5], x[..., -3:], x[..., ::3], x[..., 4:5]], -1),
    "select": lambda x, p: torch.stack([x[..., 0], x[..., -1], x.select(2, 5)], -1),
    "unbind": lambda x, p: torch.stack(x.view(1, -1, 3, 4).unbind(2), 2).flatten(2) + torch.cat(x.split([2, 10], -1), -1),
    "narrow": lambda x, p: x.narrow(-1, 3, 4),
    "stack_last": lambda x, p: torch.stack((x, -x), -1).flatten(2),
    "repeat": lambda x, p: x.repeat(1, 1, 2) + x.repeat_interleave(2, dim=-1),
    "expand": lambda x, p: x.view(1, -1, 3, 1, 4).expand(-1, -1, 3, 2, 4).reshape(1, -1, 24),
    "flip": lambda x, p: x.flip(-1),
    "pad": lambda x, p: F.pad(x, (1, 2), value=0.5),
    "triangle": lambda x, p: (x.view(1, -1, 3, 4) * torch.ones(3, 4).tril(-1)).flatten(2),
    "fills": lambda x, p: x + torch.zeros_like(x) + torch.ones(12) + torch.full((12,), 2.5) + torch.full_like(x, -1.0),
    "infinite": lambda x, p: torch.where(x > 0, x, torch.full_like(x, float("-inf"))).softmax(-1),
    "indices": lambda x, p: x + torch.arange(12) + torch.arange(0, 24, 2),
    "positions": lambda x, p: x + torch.arange(x.shape[1])[None, :, None],
    "one_hot": lambda x, p: F.one_hot(p % 5, 5).float(),
    "lookup": lambda x, p: x[..., [3, 1, 1]] + x.index_select(-1, torch.tensor([0, 2, 4])),
    "topk": routed,
    "scatter": scattered,
    "complex": complex_rotation,
    "assign": assigned,
    "casts": lambda x, p: x.double().float() + (x > 0).to(x.dtype) + p[..., None].to(torch.float32).type_as(x),
    "layer_norm": lambda x, p: F.layer_norm(x, (12,)) + F.rms_norm(x, (12,), eps=1e-5),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_converter_computes_what_torch_computes(name: str) -> None:
    model, walker, module = walk(RIGHT[name])
    assert not walker.problems, walker.problems
    for length in (2, 13):
        rng = np.random.default_rng(length)
        ids, positions = rng.integers(0, VOCAB, length), np.arange(length)
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)[None], torch.from_numpy(positions)[None])[0].numpy()
        weights = [p.source.read() for p in walker.params.values()]
        found = interpreter.run(module, [ids.astype(np.int32), positions.astype(np.int32), *weights])
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


PRODUCTS: dict[str, Any] = {
    "matmul": lambda m, x, p: x @ m.square,
    "addmm": lambda m, x, p: torch.addmm(m.unit[0], x[0], m.square)[None],
    "linear": lambda m, x, p: F.linear(x, m.square, m.unit[0]),
    "one_row": lambda m, x, p: F.linear(x, m.unit).sigmoid() * x,
    "head_linear": lambda m, x, p: F.linear(x.view(1, -1, 3, 4), m.square[:5, :4]).flatten(2),
    "batched": lambda m, x, p: torch.einsum("bshd,hde->bshe", x.view(1, -1, 3, 4), m.square[:, :4].reshape(3, 4, 4)).flatten(2),
}


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_products(name: str) -> None:
    body = PRODUCTS[name]

    def bound(self: Any, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return body(self, x, p)

    model, walker, module = walk(bound)  # type: ignore[arg-type]
    assert not walker.problems, walker.problems
    ids, positions = np.array([3, 30, 0, 7, 11]), np.arange(5)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None], torch.from_numpy(positions)[None])[0].numpy()
    weights = [p.source.read() for p in walker.params.values()]
    found = interpreter.run(module, [ids.astype(np.int32), positions.astype(np.int32), *weights])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


REFUSED: dict[str, tuple[Function, str]] = {
    "mean_of_tokens": (lambda x, p: x - x.mean(1, keepdim=True), "a reduction along the tokens"),
    "running_sum": (lambda x, p: x.cumsum(1), "a cumulative sum along the tokens"),
    "previous_token": (lambda x, p: x - F.pad(x[:, :-1], (0, 0, 1, 0)), "along the tokens"),
    "scores": (lambda x, p: (x @ x.transpose(1, 2)).softmax(-1) @ x, "every pair of tokens"),
    "token_softmax": (lambda x, p: x.softmax(1), "a softmax along the tokens"),
    "backwards": (lambda x, p: x.flip(1), "a reversal along the tokens"),
    "no_converter": (lambda x, p: torch.special.bessel_j0(x), "no conversion"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_mixes_tokens_is_refused(name: str) -> None:
    """A step holds tokens of many sequences: anything but attention that looks along them would be wrong without a word."""
    body, reason = REFUSED[name]
    _, walker, _ = walk(body)
    assert any(reason in problem.why for problem in walker.problems), walker.problems


def test_the_table_is_whole() -> None:
    assert {"aten.add", "aten.linear", "llmc.attention", "llmc.moe", "aten.view_as_complex"} <= set(CONVERTERS)
