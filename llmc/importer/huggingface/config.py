"""``config.json`` to a transformers config of a causal language model, or one clear reason why that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmc.errors import ModelError, UnsupportedError

CONFIG = "config.json"
QUANTIZATION = ("quantization_config", "compression_config")
"""Where ``config.json`` says how weights are quantized; the second is what compressed-tensors wrote first."""
QUANTIZATION_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}
"""Files that say so where ``config.json`` does not -> the method they are of."""
# class-name endings that mean "predicts the next token" in transformers and in the model code it grew from
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "Decoder")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ModelError if the file cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, not an object: download it again")
    return value


def first_line(error: BaseException) -> str:
    """What a library's many-line error says, on one line."""
    return " ".join(str(error).split())[:300]


def config_from_dict(values: dict[str, Any], where: str) -> Any:
    """The transformers config of ``values`` (``model_type`` and its fields). Runs no code that came with the model.

    Raises UnsupportedError for a type that this transformers does not know, ModelError for fields it refuses.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = dict(values)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ModelError(f"{where} has no model_type, so it is not known what model this is: use the model's original config.json")
    if model_type not in CONFIG_MAPPING:
        own_code = " (it comes with its own Python code, which llmc never runs)" if "auto_map" in values else ""
        raise UnsupportedError(
            f"{where} has model_type {model_type!r}, which transformers {transformers.__version__} does not know{own_code}: "
            "install an llmc with a newer transformers, or use a model of a known type"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"{where} is refused by transformers as a {model_type} config: {first_line(error)}") from error


def causal_config(config: Any, where: str) -> Any:
    """``config``, or its text part if it is a multimodal one, that transformers has a causal language model class for.

    Raises UnsupportedError naming the class for encoders, encoder-decoders, classifiers and text parts without such a class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kinds = [str(name) for name in config.architectures or ()]
    named = f"{' / '.join(kinds) or type(config).__name__} (model_type {config.model_type!r})"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{where} describes {named}, an encoder-decoder, and llmc compiles decoder-only language models")
    text = config.get_text_config(decoder=True)
    if text is not config:
        if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UnsupportedError(
                f"{where} describes {named}, a multimodal model, and transformers has no causal language model "
                f"for its text part ({text.model_type!r}): use a text-only model"
            )
        return text
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedError(f"{where} describes {named}, for which transformers has no causal language model class")
    if kinds and not any(name.endswith(_CAUSAL_ENDINGS) for name in kinds):
        raise UnsupportedError(
            f"{where} describes {named}, which does not predict the next token: llmc compiles causal language models "
            "(an architecture that ends in ForCausalLM)"
        )
    return config


def load_config(folder: Path) -> tuple[Any, bool]:
    """The causal language model's config in ``folder``, and whether it is the text part of a multimodal model.

    It says nothing of quantization: transformers builds the model of plain layers. Raises ModelError and UnsupportedError as the
    functions above.
    """
    path = folder / CONFIG
    values = read_json(path)
    for part in (values, values.get("text_config")):
        if isinstance(part, dict):
            for key in QUANTIZATION:
                part.pop(key, None)
    config = config_from_dict(values, str(path))
    causal = causal_config(config, str(path))
    return causal, causal is not config


def load_quantization(folder: Path) -> dict[str, Any] | None:
    """How the weights in ``folder`` are quantized, a ``quantization_config``; None if they are not."""
    values = read_json(folder / CONFIG)
    for part in (values, values.get("text_config")):
        for key in QUANTIZATION:
            if isinstance(part, dict) and isinstance(part.get(key), dict):
                return dict(part[key])
    for name, method in QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            return {"quant_method": method, **read_json(folder / name)}
    return None
