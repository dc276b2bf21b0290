"""bitsandbytes checkpoints: NF4 (QLoRA, arXiv:2305.14314) and LLM.int8 (arXiv:2208.07339).

NF4: ``weight`` uint8 [o · k / 2, 1], two codes a byte, the first in the high half; a scale (``absmax``) for every 64 weights of the
flattened matrix; ``quant_state.bitsandbytes__nf4``: JSON with the shape. With double quantization a scale is itself a code:
``nested_quant_map[absmax] · nested_absmax + offset``, taken here in float32 as bitsandbytes does, so no bit is lost.

LLM.int8: ``weight`` int8 [o, k] and ``SCB`` float32 [o], w = code · SCB / 127; the quotient is taken once, in float32.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np

from llmc.errors import ModelError
from llmc.importer.file_tensor import FileTensor
from llmc.importer.huggingface.quantized.modules import Modules, QuantizedWeight
from llmc.passes.quantize.scheme import GROUPS, NF4, QuantizedTensor, scheme

STATE = "quant_state.bitsandbytes__"
INT8 = "int8_f32"


def read(modules: Modules, config: dict[str, Any]) -> None:
    """Replace every layer that has a quantization state or ``SCB``."""
    for name in [n for n in modules.tensors if f".{STATE}" in n]:
        weight, kind = name.split(f".{STATE}")
        if kind != "nf4":
            raise modules.refusal(weight, f"to 4 bits of the type {kind}")
        modules.add(weight, _nf4(modules, weight))
    for module in list(modules.having("SCB")):
        modules.add(f"{module}.weight", _int8(modules, module))


def _nf4(modules: Modules, name: str) -> QuantizedWeight:
    state = _state(modules.take(name, f"{STATE}nf4"))
    codes = modules.tensors.pop(name, None)
    if codes is None:
        raise ModelError(f"the checkpoint holds the quantization state of {name} without {name}: download it again")
    o, k = (int(d) for d in state["shape"])
    block = int(state["blocksize"])
    if block not in GROUPS:
        raise modules.refusal(codes.describe(), f"to 4 bits in blocks of {block}")
    if k % block:
        raise modules.refusal(codes.describe(), f"to 4 bits in blocks of {block} that run on from row to row of {k} columns")
    scales = modules.take(name, "absmax")
    table = modules.take(name, "quant_map")
    if not np.array_equal(table.read(), np.array(NF4, np.float32)):
        raise modules.refusal(table.describe(), "to 4 bits with a table of values of its own")
    nested = (modules.take(name, "nested_absmax"), modules.take(name, "nested_quant_map")) if scales.dtype == "uint8" else None
    if codes.shape[0] * 2 != o * k or scales.shape != (o * k // block,):
        raise ModelError(
            f"{codes.describe()} is {list(codes.shape)} with {list(scales.shape)} scales, which is no matrix {[o, k]}: "
            "download it again"
        )
    scheme_name = f"nf4_g{block}_f32"
    return QuantizedWeight(codes.describe(), (o, k), scheme_name, partial(_load_nf4, codes, scales, nested, state, scheme_name))


def _state(stored: FileTensor) -> dict[str, Any]:
    try:
        found = json.loads(bytes(stored.read()))
        return {key: found[key] for key in ("shape", "blocksize")} | {
            "nested_blocksize": found.get("nested_blocksize"),
            "nested_offset": found.get("nested_offset"),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{stored.describe()} is no quantization state ({error}): download the checkpoint again") from error


def _load_nf4(
    codes: FileTensor, scales: FileTensor, nested: tuple[FileTensor, FileTensor] | None, state: dict[str, Any], name: str
) -> QuantizedTensor:
    o, k = (int(d) for d in state["shape"])
    stored = codes.read().reshape(-1)
    unpacked = np.stack([stored >> 4, stored & 15], axis=1).reshape(o, k)
    values = scales.read()
    if nested is not None:
        factors, table = (part.read().astype(np.float32) for part in nested)
        spread = np.repeat(factors, int(state["nested_blocksize"]))[: len(values)]
        values = table[values] * spread + np.float32(state["nested_offset"])
    return QuantizedTensor(scheme(name), unpacked, values.astype(np.float32).reshape(o, -1))


def _int8(modules: Modules, module: str) -> QuantizedWeight:
    codes, scales = modules.take(module, "weight"), modules.take(module, "SCB")
    form = modules.take_if(module, "weight_format")
    if codes.dtype != "int8" or (form is not None and int(form.read()) != 0):
        raise modules.refusal(codes.describe(), "to 8 bits with rows in another order than the matrix's")
    o, k = codes.shape
    modules.expect(scales, (o,), f"a matrix {[o, k]}")
    return QuantizedWeight(codes.describe(), (o, k), scheme(INT8).name, partial(_load_int8, codes, scales))


def _load_int8(codes: FileTensor, scales: FileTensor) -> QuantizedTensor:
    return QuantizedTensor(
        scheme(INT8), codes.read().view(np.uint8) ^ 0x80, (scales.read().astype(np.float32) / np.float32(127)).reshape(-1, 1)
    )
