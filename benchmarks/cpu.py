"""A small model's speed on this CPU beside other engines, on the same weights, in one run.

    python benchmarks/cpu.py MODEL.gguf --peers PYTHON [--ort FOLDER] [--threads 2] [--rounds 5]

Compiles MODEL.gguf with llmc as it is, and runs every engine in turn, a fresh process each, round by round: what disturbs the
machine disturbs all of them. ``PYTHON``: an interpreter that has llama-cpp-python, openvino-genai or onnxruntime-genai; what
it lacks is named in the table. ``--ort``: the model as onnxruntime-genai's builder writes it. Medians over the rounds go to
``benchmarks/cpu.md`` with ratios to the best peer, and decode as a fraction of what reading the weights takes at the measured
bandwidth. The same tokens for all: the start of the repository's licence.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
PROMPT = 512


@dataclass
class Engine:
    """``python`` runs it on ``model``; ``turns`` is what each round gave."""

    name: str
    python: str
    model: str
    turns: list[dict[str, float]] = field(default_factory=list)
    error: str = ""

    def turn(self, threads: int, prompt: Path) -> None:
        if self.error:
            return
        command = [self.python, str(HERE / "cpu_worker.py"), self.name, self.model, str(threads), str(prompt)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        result = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"error": f"exit status {done.returncode}"}
        if "error" in result:
            self.error = str(result["error"])
        else:
            self.turns.append(result)

    def median(self, figure: str) -> float | None:
        values = [t[figure] for t in self.turns if figure in t]
        return statistics.median(values) if values else None


def compiled(gguf: Path, folder: Path) -> Path:
    """The artifact of ``gguf`` in ``folder``."""
    out = folder / "artifact"
    subprocess.run([sys.executable, "-m", "llmc.cli.main", "compile", str(gguf), "-o", str(out), "-q"], check=True)
    return out


def prompt_ids(artifact: Path) -> list[int]:
    import llmc

    ids: list[int] = llmc.load(artifact).encode((HERE.parent / "LICENSE").read_text(encoding="utf-8"))[:PROMPT]
    return ids


def ratio(value: float | None, others: list[float | None]) -> str:
    """``value`` by the best of the others."""
    best = max((o for o in others if o is not None), default=None)
    return "" if value is None or best is None else f"{value / best:.2f}"


def cell(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def report(engines: list[Engine], limit: float, weights: int, arguments: argparse.Namespace) -> str:
    """The table and how it came about."""
    lines = [
        "# Speed on a CPU",
        "",
        f"{arguments.model.name} on {platform.processor() or platform.machine()}, {arguments.threads} threads, "
        f"{arguments.rounds} rounds of all engines in turn; medians. Read bandwidth measured in this run: {limit / 1e9:.1f} GB/s, "
        f"so that {limit / weights:.0f} tokens a second would read the weights ({weights / 1e6:.1f} MB) and do nothing else.",
        "",
        f"| engine | prefill {PROMPT}, tok/s | decode 128, tok/s | of the read limit | nll of the prompt |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for e in engines:
        if e.error:
            lines.append(f"| {e.name} | did not run: {e.error} | | | |")
            continue
        decode = e.median("decode")
        share = "" if decode is None else f"{100 * decode * weights / limit:.0f} %"
        lines.append(f"| {e.name} | {cell(e.median('prefill'))} | {cell(decode)} | {share} | {cell(e.median('nll'), 4)} |")
    ours, peers = engines[0], engines[1:]
    lines += [
        "",
        f"llmc by the best peer: prefill {ratio(ours.median('prefill'), [p.median('prefill') for p in peers])}, "
        f"decode {ratio(ours.median('decode'), [p.median('decode') for p in peers])}.",
        "",
        f"    python benchmarks/cpu.py {arguments.model.name} --peers PYTHON --threads {arguments.threads}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--ort", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    from llmc.bench import read_bandwidth

    with tempfile.TemporaryDirectory() as scratch:
        artifact = compiled(arguments.model, Path(scratch))
        prompt = Path(scratch) / "prompt.json"
        prompt.write_text(json.dumps(prompt_ids(artifact)), encoding="utf-8")
        engines = [Engine("llmc", sys.executable, str(artifact))]
        engines += [Engine(name, arguments.peers, str(arguments.model)) for name in ("llama.cpp", "openvino")]
        if arguments.ort:
            engines.append(Engine("onnxruntime", arguments.peers, arguments.ort))
        limits = []
        for number in range(arguments.rounds):
            limits.append(read_bandwidth(arguments.threads))
            for engine in engines:
                engine.turn(arguments.threads, prompt)
                print(number, engine.name, engine.error or engine.turns[-1], flush=True)
        weights = sum(f.stat().st_size for f in (artifact / "weights").rglob("*") if f.is_file())
    text = report(engines, max(limits), weights, arguments)
    (HERE / "cpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
