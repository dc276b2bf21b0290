# %% [markdown]
# # A quantized checkpoint, from folder to tokens
#
# Many models are published quantized: by GPTQ, AWQ, compressed-tensors, as FP8 or NF4. llmc takes their codes and scales over as
# they are, so that nothing is rounded twice. The packages that made them are not needed.
#
# Run this file as a script (`python tutorials/02_quantized_checkpoints.py [MODEL]`) or cell by cell in an editor that knows `# %%`.
# `MODEL` is a folder or a hub id, such as the half billion parameters that are fetched without one (0.5 GB).

# %%
import sys
import tempfile
from pathlib import Path

import numpy as np

import llmc
from llmc.importer.huggingface.config import load_quantization
from llmc.importer.resolve import resolve
from llmc.passes.quantize.report import table
from llmc.reference import reference_model

arguments = [a for a in sys.argv[1:] if not a.startswith("-")]
MODEL = arguments[0] if arguments else "Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4"
folder = Path(tempfile.mkdtemp(prefix="llmc-tutorial-"))

# %% [markdown]
# ## What the folder says
#
# `config.json` names the method. What is not quantized (the embedding, norms, often the output matrix) lies beside it as floats.

# %%
source = resolve(MODEL)
settings = load_quantization(source.path)
assert settings is not None, "this tutorial wants a quantized model"
print({name: settings[name] for name in ("quant_method", "bits", "group_size", "desc_act") if name in settings})

# %% [markdown]
# ## Compile
#
# Without `quant` and `dtype`, quantized matrices stay as they are. The table has a line for all matrices of a kind: "exact" are
# those whose codes were taken over. Projections that read the same activations are one matrix, quantized or not.

# %%
report = llmc.compile(MODEL, out=folder / "artifact", context=512)
print("\n".join(table(report.weights)))
exact = [row for row in report.weights if row.error == 0]
print(f"{sum(row.count for row in exact)} matrices are stored by {', '.join(sorted({row.scheme for row in exact}))}")

# %% [markdown]
# ## Compare
#
# The reference is transformers with the weights that the codes stand for, in float32. What differs is the activations, which
# kernels for integer weights round to 8 bits on a CPU.

# %%
with llmc.load(folder / "artifact") as model:
    ids = model.encode("The capital of France is")
    found, expected = model.logits(ids), reference_model(MODEL).logits(ids)
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    print(f"relative error of the logits: {error:.1e}")
    assert error < 0.1
    for event in model.generate("The capital of France is", max_tokens=16, stream=True):
        print(event.text, end="", flush=True)
    print()

# %% [markdown]
# ## Round something else
#
# `keep` makes exceptions by regular expression, and the rest stays native: `llmc compile MODEL -o OUT --keep lm_head=int8`, or
# `--keep 'down_proj=none'` for floats. `--quant int8` reads the codes as floats and rounds them all anew, which costs accuracy.
