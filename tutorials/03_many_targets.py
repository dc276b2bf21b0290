# %% [markdown]
# # One artifact for many machines, and a folder to deploy
#
# An artifact holds a variant for every target that it was compiled for, and one set of weights for all of them. Variants are made
# on any machine: none of the targets has to be there.
#
# Run this file as a script (`python tutorials/03_many_targets.py [MODEL]`) or cell by cell in an editor that knows `# %%`.

# %%
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import llmc
from llmc import manifest
from llmc.deploy import package

arguments = [a for a in sys.argv[1:] if not a.startswith("-")]
MODEL = arguments[0] if arguments else "smollm2-135m"
folder = Path(tempfile.mkdtemp(prefix="llmc-tutorial-"))

# %% [markdown]
# ## Several targets at once
#
# The same as `llmc compile MODEL --target cpu --target opencl:generic -o OUT`. `llmc compile --help` and an unknown target's error
# list what there is: `cuda:sm_90a`, `rocm:gfx942`, `metal:apple8`, ...

# %%
artifact = folder / "artifact"
report = llmc.compile(MODEL, out=artifact, target=["cpu", "opencl:generic"], context=256)
for variant in report.manifest.variants:
    print(f"{variant.target}: {len(variant.weights)} weights, {variant.library}")

# %% [markdown]
# ## One more, later
#
# `llmc add OUT --target T`. What a variant stores as another does is shared; a tensor that it stores in another way gets a name of
# its own, such as `lm_head.weight@2`. The artifact is replaced as the last step, so whoever has it open keeps the old one.

# %%
before = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
llmc.add(artifact, target="rocm:gfx942")
after = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
m = manifest.read(artifact)
print(f"{', '.join(v.target for v in m.variants)}: {(after - before) / 1e6:.1f} MB more")
shared = set.intersection(*(set(v.weights) for v in m.variants))
print(f"{len(shared)} of {len(m.tensors)} tensors are shared by all variants")

# %% [markdown]
# ## Which one runs
#
# The loader scores the variants against the machine and says why it took one; so does `llmc inspect OUT`.

# %%
with llmc.load(artifact) as model:
    ids = model.encode("The capital of France is")
    expected = list(model.generate(ids, max_tokens=8).token_ids)
    print(expected)

# %% [markdown]
# ## The smallest folder that runs it
#
# `llmc package OUT --for cpu -o DIR`: one variant with its weights, TVM's runtime libraries for that platform (out of its wheels,
# where it is another than this), the Python loader, a Dockerfile and, where TVM's own libraries run the target, a C example.

# %%
packaged = package(artifact, target="cpu", out=folder / "package")
print(f"{packaged.runtime / 1e6:.1f} MB beside weights and tokenizer: {', '.join(sorted(p.name for p in packaged.out.iterdir()))}")
done = subprocess.run([sys.executable, "run.py", "--max-tokens", "8", "The capital of France is"], cwd=packaged.out, check=True)

# %% [markdown]
# The C example takes token ids and prints those that follow. Its first lines say how it is built.

# %%
text = (packaged.out / "example.c").read_text(encoding="utf-8")
command = next(line for line in text.splitlines() if line.startswith(" *   cc ")).removeprefix(" *   ")
print(command)
if shutil.which("cc") and platform.system() == "Linux":
    subprocess.run(shlex.split(command), cwd=packaged.out, check=True)
    done = subprocess.run(["./example", "8", *map(str, ids)], cwd=packaged.out, check=True, capture_output=True, text=True)
    found = [int(token) for token in done.stdout.split()]
    print(found)
    assert found == expected
