"""How compile time grows with depth: the same decoder with 2, 8 and 32 layers, each compiled in a process of its own.

python benchmarks/compile_time.py [--repeat 3]        prints the table and writes benchmarks/compile_time.md
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
DEPTHS = (2, 8, 32)
SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 4099,
}
CHILD = """
import json, sys
from llmc.compiler import compile
report = compile(sys.argv[1], out=sys.argv[2], dtype="float16")
print(json.dumps(report.seconds))
"""
LOWERING = ("passes", "machine code")


def compile_once(model: Path, out: Path) -> dict[str, float]:
    """Seconds by phase, and ``process``: the whole process, imports of torch and TVM included."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, str(model), str(out)], capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "process": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    sys.path.insert(0, str(ROOT))
    from tests.support.tiny_models import build

    runs: dict[int, list[dict[str, float]]] = {depth: [] for depth in DEPTHS}
    with tempfile.TemporaryDirectory() as scratch:
        models = {d: build("llama", Path(scratch) / f"model-{d}", num_hidden_layers=d, **SIZES) for d in DEPTHS}
        for number in range(repeat):  # in turn, so that a slow minute hits every depth
            for depth, model in models.items():
                runs[depth].append(compile_once(model, Path(scratch) / f"out-{depth}-{number}"))
    middle = {d: {phase: median(r[phase] for r in rs) for phase in rs[0]} for d, rs in runs.items()}
    rows = [
        (
            str(d),
            *(f"{middle[d][p]:.2f}" for p in ("import graph", *LOWERING, "weights", "process")),
            f"{sum(middle[d][p] for p in LOWERING) / sum(middle[2][p] for p in LOWERING):.2f}",
            f"{middle[d]['process'] / middle[2]['process']:.2f}",
        )
        for d in DEPTHS
    ]
    head = (
        *("layers", "import graph s", "passes s", "machine code s", "weights s", "process s"),
        *("lowering ratio", "process ratio"),
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head), *("| " + " | ".join(r) + " |" for r in rows)]
    sizes = ", ".join(f"{k} {v}" for k, v in SIZES.items())
    text = (
        "# Compile time over depth\n\n"
        f"`python benchmarks/compile_time.py --repeat {repeat}`: median of {repeat} runs; a llama-like decoder ({sizes}), float16, "
        f"CPU target; {platform.machine()}, Python {platform.python_version()}. Ratios are to 2 layers; lowering is passes plus "
        "machine code.\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    (ROOT / "benchmarks" / "compile_time.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
