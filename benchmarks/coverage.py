"""Which model types import, and compute what transformers computes: every causal-LM type of transformers, at random weights.

    python benchmarks/coverage.py [TYPE ...]        prints one line a type and, for all types, writes docs/coverage.md

One generic tiny configuration is offered to every type; a type that rejects it says nothing about llmc and is listed as such.
The imported graph runs in the NumPy interpreter of the tests, so what is compared is the importer alone. Each type runs in a
process of its own with a time limit.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 321
SECONDS = 120
CONFIG = {
    "vocab_size": VOCAB, "hidden_size": 60, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 20, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
    "n_embd": 60, "n_head": 3, "n_layer": 2, "n_positions": 128, "n_inner": 72, "d_model": 60, "num_layers": 2, "num_heads": 3,
    "ffn_dim": 72, "word_embed_proj_dim": 60, "num_experts": 5, "num_local_experts": 5, "n_routed_experts": 5,
    "num_experts_per_tok": 2, "moe_intermediate_size": 28, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "sliding_window": 6, "attention_chunk_size": 8,
}  # fmt: skip
# Latent attention needs its own widths; they are offered to a type that rejects the generic ones.
LATENT = {
    "num_key_value_heads": 3, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 16, "head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip


def check(model_type: str) -> str:
    """``right 4e-07``, or why not. Runs in the child."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    from llmc.dialect import interpreter
    from llmc.errors import UnsupportedError
    from llmc.importer.model import import_model
    from llmc.importer.params import Constant, ParamTable
    from llmc.importer.source import Binding

    logging.set_verbosity_error()

    def reference(changes: dict[str, object]) -> torch.nn.Module:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**CONFIG, **changes})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.15 + (0.3 if parameter.ndim == 1 else 0))
            ids = torch.from_numpy(np.random.default_rng(1).integers(3, VOCAB, 19))
            model.expected = model(input_ids=ids[None], use_cache=False).logits[0].numpy()
        return model

    changes: dict[str, object] = {}
    try:
        try:
            model = reference(changes)
        except Exception:
            changes = dict(LATENT)
            model = reference(changes)
    except Exception as error:
        return f"config {type(error).__name__}: {' '.join(str(error).split())[:90]}"

    class Source:
        name, kind, path, dtype = model_type, "random", ROOT, "float32"
        config = AutoConfig.for_model(model_type, **{**CONFIG, **changes})

        def bind(self, _: object) -> Binding:
            table, tied, seen = ParamTable(), {}, {}
            for name, value in model.state_dict(keep_vars=True).items():
                if id(value) in seen:
                    tied[name] = seen[id(value)]
                else:
                    seen[id(value)] = name
                    table.add(name, Constant(value.detach().numpy(), name))
            return Binding(table, tied)

    try:
        imported = import_model(Source(), storage_dtype="float32", context=128)  # type: ignore[arg-type]
    except UnsupportedError as error:
        reason = str(error).split("\n")
        return f"refused {' '.join((reason[1] if len(reason) > 1 else reason[0]).split())[:150]}"
    ids = np.random.default_rng(1).integers(3, VOCAB, 19).astype(np.int32)
    weights = [p.source.read() for p in imported.params.values()]
    found = interpreter.run(imported.mod, [ids, np.arange(19, dtype=np.int32), *weights])
    error = float(np.abs(found - model.expected).max() / np.abs(model.expected).max())
    return f"{'right' if error < 1e-4 else 'WRONG'} {error:.0e}"


def run(model_type: str) -> str:
    try:
        command = [sys.executable, __file__, "--child", model_type]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"slow: more than {SECONDS} s"
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines else f"FAILED {done.stderr.strip().splitlines()[-1:]}"


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--child"]:
        print(check(sys.argv[2]))
        return
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = {}
    for model_type in types:
        results[model_type] = run(model_type)
        print(f"{model_type:24} {results[model_type]}", flush=True)
    if sys.argv[1:]:
        return
    kinds = Counter(r.split()[0].rstrip(":") for r in results.values())
    right = ", ".join(t for t, r in results.items() if r.startswith("right"))
    rest = "\n".join(f"| {t} | {r.replace('|', '/')} |" for t, r in results.items() if not r.startswith("right"))
    text = (
        "# What imports\n\n"
        f"`python benchmarks/coverage.py`, transformers {transformers.__version__}: of {len(results)} model types with a causal-LM "
        f"class, {kinds['right']} import and give transformers' logits (relative error under 1e-4 through a NumPy interpreter), "
        f"{kinds['refused']} are refused with a reason, {kinds['config']} reject the one tiny configuration all types are offered, "
        f"{len(results) - kinds['right'] - kinds['refused'] - kinds['config']} did neither. None was imported wrongly: "
        f"{kinds['WRONG']}.\n\n**Right:** {right}\n\n| type | |\n|---|---|\n{rest}\n"
    )
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "coverage.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
