"""GGUF metadata to a transformers config: by transformers' own mapping, completed with what that mapping leaves out.

Left out, and needed for the right numbers: rope scaling (in metadata, or as a tensor of frequency factors), partial rotary
widths, head sizes, windows, soft-caps and expert widths that differ from the config class's defaults.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.gguf.file import GGUFFile
from llmc.importer.huggingface.config import first_line

# tensors that hold divisors of rope's frequencies, [rotary / 2] float32; they become part of the config
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# metadata keys after "<architecture>." -> config fields of the same meaning, where a config class has them
_FIELDS = {
    "context_length": ("n_positions",),
    "attention.key_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
# arrays longer than this are vocabularies: no config field needs them, and parsing them takes seconds
_LONG_ARRAY = 4096


def _write_stub(file: GGUFFile, path: Path) -> None:
    """A small GGUF file at ``path`` with ``file``'s metadata, less the vocabulary, and its tensor names over one number each."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, file.architecture)
    for key, value in file.metadata.items():
        if key == "general.architecture" or (isinstance(value, list) and not 0 < len(value) <= _LONG_ARRAY):
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_key_value(key, value, GGUFValueType.INT64 if value < 0 else GGUFValueType.UINT64)
        elif isinstance(value, float):
            writer.add_float64(key, value)
        elif value:  # the writer's own reader trips over empty strings
            writer.add_string(key, value)
    for name in file.tensors:
        writer.add_tensor(name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _mapped_by_transformers(file: GGUFFile) -> dict[str, Any]:
    """The config fields that transformers finds in the metadata. Raises UnsupportedError for an architecture it does not map."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, load_gguf_checkpoint

    try:
        if file.architecture in GGUF_CONFIG_ARCHS:
            # it expects arrays of strings as their lengths
            metadata = {k: len(v) if isinstance(v, list) and v and isinstance(v[0], str) else v for k, v in file.metadata.items()}
            return dict(get_gguf_config(metadata, tuple(file.tensors)))
        with tempfile.TemporaryDirectory(prefix="llmc-gguf-") as folder:
            stub = Path(folder) / "head.gguf"
            _write_stub(file, stub)
            return dict(load_gguf_checkpoint(str(stub), return_tensors=False)["config"])
    except ValueError as error:
        if "not supported" not in str(error):
            raise ModelError(f"the metadata of {file.path} does not make a model config ({first_line(error)})") from error
        known = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"} | set(GGUF_CONFIG_ARCHS))
        raise UnsupportedError(
            f"{file.path} has architecture {file.architecture!r}, for which transformers has no GGUF mapping (it has "
            f"{', '.join(known)}): compile the model's Hugging Face folder instead"
        ) from error
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"the metadata of {file.path} lacks what a {file.architecture!r} model needs ({first_line(error)})"
        ) from error


def fit_frequency_bands(factors: np.ndarray, inv_freq: np.ndarray, original: int) -> dict[str, float] | None:
    """The ``llama3`` rope parameters that make ``factors`` (divisors of ``inv_freq``, both ``[rotary / 2]``), if any do.

    The formula (transformers ``_compute_llama3_parameters``): with w = 2 pi / inv_freq, 1 where w < original / high, ``factor``
    where w > original / low, between them 1 / ((1 - s) / factor + s) with s = (original / w - low) / (high - low).
    """
    factor, low, high = float(factors.max()), 1.0, 4.0
    wavelength = 2 * math.pi / inv_freq
    s = np.clip((original / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - s) / factor + s), factors, rtol=1e-4):
        return None
    return {"factor": factor, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}


def rope_scaling(file: GGUFFile, theta: float, context: int) -> dict[str, Any] | None:
    """transformers' rope parameters for the file's scaling, without ``rope_theta``; None if positions are not scaled.

    Raises UnsupportedError for a scaling that llmc does not know.
    """
    prefix = f"{file.architecture}.rope.scaling"
    kind = str(file.metadata.get(f"{prefix}.type", "none"))
    factor = float(file.metadata.get(f"{prefix}.factor", 1.0))
    original = int(file.metadata.get(f"{prefix}.original_context_length", 0))
    tensors = [file.tensors[name].read().astype(np.float64) if name in file.tensors else None for name in ROPE_TENSORS]
    shared, long, short = tensors
    if long is not None and short is not None:
        return {
            "rope_type": "longrope",
            "long_factor": long.tolist(),
            "short_factor": short.tolist(),
            "attention_factor": float(file.metadata.get(f"{prefix}.attn_factor", 1.0)),
            "original_max_position_embeddings": original or context,
        }
    if shared is not None and not np.all(shared == 1):
        inv_freq = theta ** (-np.arange(len(shared)) / len(shared))
        for length in (8192, original):
            fitted = fit_frequency_bands(shared, inv_freq, length)
            if fitted:
                return {"rope_type": "llama3", **fitted}
        # longrope with the same divisors for every length is what the tensor says
        same = {"long_factor": shared.tolist(), "short_factor": shared.tolist(), "attention_factor": 1.0}
        return {"rope_type": "longrope", **same, "original_max_position_embeddings": context}
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original or round(context / factor)}
        attention = file.metadata.get(f"{prefix}.attn_factor")
        return yarn if attention is None else yarn | {"attention_factor": float(attention) * (0.1 * math.log(factor) + 1)}
    raise UnsupportedError(
        f"{file.path} scales rope by {kind!r}, which llmc does not know: compile the model's Hugging Face folder instead"
    )


def config_values(file: GGUFFile) -> dict[str, Any]:
    """The fields of the transformers config (with ``model_type``) that describe ``file``.

    Raises UnsupportedError and ModelError as the functions above.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = _mapped_by_transformers(file)
    values.pop("_model_name_or_path", None)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        values.setdefault("vocab_size", len(tokens))
    model_type = str(values.get("model_type"))
    fields = set(CONFIG_MAPPING[model_type]().to_dict()) if model_type in CONFIG_MAPPING else set()
    for key, names in _FIELDS.items():
        value = file.metadata.get(f"{file.architecture}.{key}")
        for name in names:
            if isinstance(value, (int, float)) and name in fields:
                values[name] = value
    if "rope_parameters" in values:
        return values  # transformers mapped rope in full
    theta, context = float(values.get("rope_theta", 10000.0)), int(values.get("max_position_embeddings", 0))
    values.pop("rope_scaling", None)
    scaling = rope_scaling(file, theta, context)
    if scaling:
        values["rope_scaling"] = scaling
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    rotary = file.metadata.get(f"{file.architecture}.rope.dimension_count")
    head_dim = values.get("head_dim") or (hidden // heads if isinstance(heads, int) and hidden else None)
    if isinstance(rotary, int) and head_dim and rotary < head_dim:
        values["partial_rotary_factor"] = rotary / head_dim
    return values
