"""Quantized layers as the libraries that publish them lay them out, written out field by field, and models made of them.

Every packer takes a shape and a generator, and returns the layer's tensors by their last names with the float32 weight that the
format's own formula makes of them. Loops follow the published description word for word: nothing is shared with the importer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

Layer = tuple[dict[str, torch.Tensor], torch.Tensor]
Packer = Callable[[int, int, np.random.Generator], Layer]
Replace = Callable[[str, torch.Tensor, np.random.Generator], Layer | None]
"""A tensor's name and value -> the tensors by name that stand for it, and the values they have; None for one that stays."""

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def _signed(words: list[list[int]]) -> torch.Tensor:
    """Words as int32, whatever their top bit."""
    return torch.tensor([[w - (1 << 32) if w >= 1 << 31 else w for w in row] for row in words], dtype=torch.int32)


def _pack(fields: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of fields as int32 words, one long number a row whose lowest field comes first."""
    rows = []
    for row in fields:
        number = sum(int(f) << (bits * i) for i, f in enumerate(row))
        rows.append([(number >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))])
    return _signed(rows)


def _scales(rng: np.random.Generator, shape: tuple[int, ...], k: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(0.5, 1.5, shape) / k**0.5).to(dtype)


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    v1: bool = True,
    dtype: torch.dtype = torch.float16,
) -> Packer:
    """AutoGPTQ's and GPTQModel's; v1 stores every zero point less one, subtracting packed words as GPTQModel does."""

    def pack(o: int, k: int, rng: np.random.Generator) -> Layer:
        size = k if group < 0 else group
        groups = -(-k // size)
        codes = rng.integers(0, 1 << bits, (k, o))
        zeros = np.full((groups, o), 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, (groups, o))
        index = np.arange(k) // size
        if act_order:  # of the columns alone: layers that read the same x share their Hessian, and so the order
            index = index[np.random.default_rng(k).permutation(k)]
        scales = _scales(rng, (groups, o), k * (1 << (2 * bits - 2)), dtype)
        weight = scales.float()[index] * torch.from_numpy(codes - zeros[index]).float()
        words = _pack(zeros, bits).numpy().view(np.uint32)
        if v1:
            one = _pack(np.ones((1, o), np.int64), bits).numpy().view(np.uint32)
            words = words - one
        parts = {
            "qweight": _pack(codes.T, bits).T.contiguous(),
            "qzeros": torch.from_numpy(words.view(np.int32).copy()),
            "scales": scales,
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }
        return parts, weight.T.contiguous()

    return pack


def awq(group: int = 32) -> Packer:
    """AutoAWQ's "gemm"."""

    def pack(o: int, k: int, rng: np.random.Generator) -> Layer:
        codes, zeros = rng.integers(0, 16, (k, o)), rng.integers(0, 16, (k // group, o))
        scales = _scales(rng, (k // group, o), k * 64)

        def words(values: np.ndarray) -> torch.Tensor:
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            return _signed(
                [[sum(int(row[8 * c + order[i]]) << (4 * i) for i in range(8)) for c in range(o // 8)] for row in values]
            )

        group_of = np.arange(k) // group
        weight = torch.from_numpy(codes - zeros[group_of]).float() * scales.float()[group_of]
        return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}, weight.T.contiguous()

    return pack


def pack_quantized(bits: int = 4, group: int = 32, *, symmetric: bool = True, act_order: bool = False) -> Packer:
    """compressed-tensors' packed integers: signed codes plus 2^(bits-1)."""

    def pack(o: int, k: int, rng: np.random.Generator) -> Layer:
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        size = k if group < 0 else group
        groups = k // size
        codes, zeros = rng.integers(low, high, (o, k)), rng.integers(low, high, (o, groups))
        index = np.arange(k) // size
        if act_order:
            index = index[np.random.default_rng(k).permutation(k)]
        scales = _scales(rng, (o, groups), k * (1 << (2 * bits - 2)), torch.bfloat16)
        parts = {"weight_packed": _pack(codes - low, bits), "weight_scale": scales, "weight_shape": torch.tensor([o, k])}
        if act_order:
            parts["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
        if symmetric:
            zeros = np.zeros_like(zeros)
        else:
            parts["weight_zero_point"] = _pack((zeros - low).T, bits).T.contiguous()
        return parts, torch.from_numpy(codes - zeros[:, index]).float() * scales.float()[:, index]

    return pack


def int_quantized(*, symmetric: bool = True) -> Packer:
    """compressed-tensors' W8A8: int8 with a scale for every output channel."""

    def pack(o: int, k: int, rng: np.random.Generator) -> Layer:
        codes, zeros = rng.integers(-128, 128, (o, k)), rng.integers(-20, 20, (o, 1))
        scales = _scales(rng, (o, 1), k * 4096, torch.bfloat16)
        parts = {"weight": torch.from_numpy(codes).to(torch.int8), "weight_scale": scales}
        if symmetric:
            zeros = np.zeros_like(zeros)
        else:
            parts["weight_zero_point"] = torch.from_numpy(zeros).to(torch.int8)
        return parts, torch.from_numpy(codes - zeros).float() * scales.float()

    return pack


def fp8(span: str, part: str = "weight_scale") -> Packer:
    """``span``: "tensor", "channel" or "block" (128 × 128)."""

    def pack(o: int, k: int, rng: np.random.Generator) -> Layer:
        codes = torch.from_numpy(rng.standard_normal((o, k)) * 20).to(torch.float8_e4m3fn)
        shape = {"tensor": (), "channel": (o, 1), "block": (-(-o // 128), -(-k // 128))}[span]
        scales = torch.from_numpy(np.asarray(rng.uniform(0.5, 1.5, shape) / 20 / k**0.5)).float()
        spread = scales
        if span == "block":
            spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:o, :k]
        return {"weight": codes, part: scales}, codes.float() * spread

    return pack


def nf4(*, nested: bool = True) -> Packer:
    """bitsandbytes' Linear4bit, blocks of 64."""

    def pack(o: int, k: int, rng: np.random.Generator) -> Layer:
        codes = rng.integers(0, 16, o * k).astype(np.uint8)
        blocks = o * k // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [o, k]}
        parts = {"weight": torch.from_numpy((codes[0::2] << 4) | codes[1::2])[:, None], "weight.quant_map": NF4.clone()}
        if nested:
            stored = torch.from_numpy(rng.integers(0, 256, blocks).astype(np.uint8))
            table = torch.linspace(-1, 1, 256)
            factors = torch.from_numpy(rng.uniform(0.1, 0.2, -(-blocks // 256)) / k**0.5).float()
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5 / k**0.5}
            scales = table[stored.long()] * factors.repeat_interleave(256)[:blocks] + torch.tensor(state["nested_offset"])
            parts |= {"weight.absmax": stored, "weight.nested_absmax": factors, "weight.nested_quant_map": table}
        else:
            scales = torch.from_numpy(rng.uniform(0.5, 1.5, blocks) / k**0.5).float()
            parts["weight.absmax"] = scales
        text = json.dumps(state).encode()
        parts["weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        weight = NF4[torch.from_numpy(codes.astype(np.int64))] * scales.repeat_interleave(64)
        return parts, weight.reshape(o, k)

    return pack


def llm_int8() -> Packer:
    """bitsandbytes' Linear8bitLt."""

    def pack(o: int, k: int, rng: np.random.Generator) -> Layer:
        codes = torch.from_numpy(rng.integers(-127, 128, (o, k))).to(torch.int8)
        largest = torch.from_numpy(rng.uniform(2, 4, o) / k**0.5).float()
        return {"weight": codes, "SCB": largest}, codes.float() * (largest / 127)[:, None]

    return pack


def mxfp4() -> Packer:
    """compressed-tensors' mxfp4-pack-quantized."""

    def pack(o: int, k: int, rng: np.random.Generator) -> Layer:
        codes = rng.integers(0, 16, (o, k))
        exponents = rng.integers(120, 124, (o, k // 32))
        packed = torch.from_numpy((codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8))
        scales = torch.from_numpy(np.exp2(exponents - 127.0)).float().repeat_interleave(32, 1)
        return {"weight_packed": packed, "weight_scale": torch.from_numpy(exponents.astype(np.uint8))}, FP4[codes] * scales

    return pack


def compressed_config(form: str, bits: int = 4, kind: str = "int", **more: Any) -> dict[str, Any]:
    """A ``quantization_config`` of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, "symmetric": True, **more}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def linears(pack: Packer, *keep: str) -> Replace:
    """Replaces every matrix but embeddings, routers, the output matrix, and those with one of ``keep`` in their name."""
    kept = ("embed", "lm_head", "gate.weight", *keep)

    def replace(name: str, value: torch.Tensor, rng: np.random.Generator) -> Layer | None:
        if value.ndim != 2 or any(part in name for part in kept):
            return None
        parts, weight = pack(*value.shape, rng)
        return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}, weight

    return replace


def mxfp4_experts(name: str, value: torch.Tensor, rng: np.random.Generator) -> Layer | None:
    """gpt-oss: experts [E, k, o], blocks and scales of their transposes."""
    if value.ndim != 3:
        return None
    experts, k, o = value.shape
    packed = [mxfp4()(o, k, rng) for _ in range(experts)]
    blocks = torch.stack([parts["weight_packed"].reshape(o, k // 32, 16) for parts, _ in packed])
    scales = torch.stack([parts["weight_scale"] for parts, _ in packed])
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, torch.stack([weight.T for _, weight in packed])


def quantize_folder(folder: Path, out: Path, replace: Replace, config: dict[str, Any]) -> tuple[Path, Path]:
    """The model in ``folder`` with what ``replace`` makes of its tensors, and the model of floats that it stands for: two folders.

    The layers' values are random: what is compared is how they are read.
    """
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    rng = np.random.default_rng(11)
    tensors: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, value in stored.items():
        parts, floats[name] = replace(name, value, rng) or ({name: value}, value)
        tensors |= parts
    values = json.loads((folder / "config.json").read_text())
    made = out / "quantized", out / "floats"
    for target, content, more in zip(made, (tensors, floats), ({"quantization_config": config}, {}), strict=True):
        target.mkdir(parents=True)
        save_file({n: t.contiguous() for n, t in content.items()}, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps({**values, **more}))
        for file_ in folder.glob("tokenizer*"):
            (target / file_.name).write_bytes(file_.read_bytes())
    return made
