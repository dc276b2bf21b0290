"""Checkpoints whose ``config.json`` says that weights are stored quantized: one module a format, chosen by ``quant_method``.

Each takes the tensors of a quantized layer (``q_proj.qweight``, ``q_proj.scales``, ...) out of the checkpoint and puts one
source in their place, ``q_proj.weight``, which gives its codes bit for bit. From there on a quantized model is a model like any
other: names are bound, projections merge, and what is stored as plain numbers stays plain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmc.errors import UnsupportedError
from llmc.importer.file_tensor import FileTensor
from llmc.importer.huggingface.quantized import awq, bitsandbytes, compressed, fp8, gptq, mxfp4
from llmc.importer.huggingface.quantized.modules import Modules
from llmc.importer.params import Source

_FORMATS: dict[str, Callable[[Modules, dict[str, Any]], None]] = {
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed.read,
    "fp8": fp8.read,
    "fbgemm_fp8": fp8.read,
    "modelopt": fp8.read_modelopt,
    "bitsandbytes": bitsandbytes.read,
    "mxfp4": mxfp4.read,
}


def quantized_sources(config: dict[str, Any] | None, tensors: Mapping[str, FileTensor], where: str) -> dict[str, Source]:
    """The sources of a checkpoint that ``config``, a ``quantization_config``, describes: quantized layers as one ``weight`` each.
    Without a config all tensors are plain.

    Reads headers, and of the data what decides on a scheme (GPTQ's zero points and column order). Raises UnsupportedError for
    a method or a variant that has no importer, ModelError for tensors that contradict each other.
    """
    if config is None:
        return Modules(dict(tensors), "a plain format").sources()
    method, settings = _method(config)
    read = _FORMATS.get(method)
    if read is None:
        raise UnsupportedError(
            f"{where} says that the weights are quantized by {method}, which llmc cannot read: use a checkpoint of one of "
            f"{', '.join(_FORMATS)}, the model's unquantized weights, or a GGUF file of it"
        )
    modules = Modules(dict(tensors), method)
    read(modules, settings)
    return modules.sources()


def _method(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The format's name, and the settings its module reads."""
    method = str(config.get("quant_method", "an unnamed method"))
    if method in ("auto-round", "intel/auto-round"):  # a tuner that packs as others do
        packing = str(config.get("packing_format", ""))
        for packed in ("gptq", "awq"):
            if packed in packing:
                return packed, {**config, "checkpoint_format": "gptq", "version": "gemm"}
    if method == "an unnamed method" and "quant_algo" in config:
        return "modelopt", config
    return method, config
