"""Random-weight Hugging Face folders of every decoder family the tests cover: a few layers, odd sizes, a byte-level tokenizer.

The sizes are awkward on purpose: head counts and widths that are no powers of two, a vocabulary that is a multiple of nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 277
END = 257
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 92,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": END,
    "pad_token_id": None,
}
NO_GROUPS = {**SIZES, "num_key_value_heads": 6}

# model type -> arguments of its configuration class; everything else is the class's default
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "tie_word_embeddings": False},
    "mistral": {**SIZES, "sliding_window": 9, "head_dim": 10},
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 14},
    "gemma2": {**SIZES, "head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 12},
    "gemma3_text": {**SIZES, "head_dim": 12, "sliding_window": 7, "num_hidden_layers": 6, "query_pre_attn_scalar": 12},
    "phi3": {**SIZES, "num_attention_heads": 5, "num_key_value_heads": 5, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_positions": 128,
        "n_embd": 60,
        "n_layer": 2,
        "n_head": 5,
        "bos_token_id": 256,
        "eos_token_id": END,
    },
    "gpt_neox": {**NO_GROUPS, "num_attention_heads": 5, "rotary_pct": 0.5},
    "starcoder2": {**SIZES, "sliding_window": None},
    "olmo2": SIZES,
    "granite": {
        **SIZES,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
    },
    "stablelm": {**SIZES, "num_attention_heads": 3, "partial_rotary_factor": 0.5},
    "cohere": {**SIZES, "logit_scale": 0.5},
    "mixtral": {**SIZES, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        **SIZES,
        "head_dim": 14,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 28,
        "norm_topk_prob": True,
    },
    # Latent attention (keys wider than values), group-limited routing, a shared expert.
    "deepseek_v3": {
        **NO_GROUPS,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 14,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    # Chunked attention, layers without rope, complex rotations, one expert a token.
    "llama4_text": {
        **SIZES,
        "head_dim": 10,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 80,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 0],
        "floor_scale": 8,
    },
    # Attention sinks, alternating windows, experts with a clipped gate and biases.
    "gpt_oss": {**SIZES, "head_dim": 10, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
}

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def build(model_type: str, folder: Path, *, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """Write a random model of ``model_type`` into ``folder`` (created) and return it. ``changes`` override its configuration.

    Norm weights, biases and scales are random too: a model whose norms are all ones would hide a missing weight.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**MODELS[model_type], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 bytes, ``<s>`` and ``</s>``, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "chat_template": CHAT_TEMPLATE,
            }
        ),
        encoding="utf-8",
    )
