"""A small model's speed on this CPU beside other engines, on the same weights, in one run.

    python benchmarks/cpu.py MODEL.gguf --peers PYTHON [--quant SCHEME [--method gptq]] [--work FOLDER] [--threads 2]

Compiles MODEL.gguf with llmc twice, as it is and with every matrix in SCHEME, and runs every engine in turn, a fresh process each,
round by round: what disturbs the machine disturbs all of them. ``PYTHON``: an interpreter that has llama-cpp-python,
openvino-genai and onnxruntime-genai (and, to build that one's model, onnx-ir, torch and transformers); what it lacks is named
in the table. llama.cpp and OpenVINO read the file as it is; ONNX Runtime gets the same weights, dequantized into a Hugging Face
folder and rounded by its own builder to int4 in blocks of 32 with int8 activations. ``--work`` keeps what was built for the
next run. Medians over the rounds go to ``benchmarks/cpu.md`` with ratios to the best peer, and decode as a fraction of what
reading the weights takes at the measured bandwidth. The same tokens for all: the start of the repository's licence.
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
        command = [self.python, str(HERE / "cpu_worker.py"), self.name.split()[0], self.model, str(threads), str(prompt)]
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


def compiled(gguf: Path, out: Path, *flags: str) -> Path:
    """The artifact of ``gguf`` at ``out``."""
    if not out.exists():
        subprocess.run([sys.executable, "-m", "llmc.cli.main", "compile", str(gguf), "-o", str(out), "-q", *flags], check=True)
    return out


def onnx_model(gguf: Path, python: str, folder: Path) -> Path | str:
    """The model as onnxruntime-genai's builder writes it, from the weights of ``gguf`` as floats; or why there is none."""
    out, floats = folder / "onnx", folder / "floats"
    if (out / "genai_config.json").exists():
        return out
    if not (floats / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where, name = str(gguf.parent), gguf.name
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name)
        model.hf_quantizer = None  # its weights are floats now, and it would refuse to write them
        del model.config.quantization_config
        model.save_pretrained(floats)
        AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(floats)
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(floats), "-o", str(out), "-c", str(folder / "cache")]
    options = ["-p", "int4", "-e", "cpu", "--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    return out if done.returncode == 0 else (done.stderr.strip().splitlines() or ["its builder failed"])[-1]


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


def report(engines: list[Engine], limit: float, sizes: dict[str, int], arguments: argparse.Namespace) -> str:
    """The table and how it came about. ``sizes``: bytes of the weights that an engine reads for a token, where they are known."""
    lines = [
        "# Speed on a CPU",
        "",
        f"{arguments.model.name} on {platform.processor() or platform.machine()}, {arguments.threads} threads, "
        f"{arguments.rounds} rounds of all engines in turn; medians. Read bandwidth measured in this run: {limit / 1e9:.1f} GB/s; "
        "the share of it is that of a decode step that reads every weight once.",
        "",
        f"| engine | weights, MB | prefill {PROMPT}, tok/s | decode 128, tok/s | of the read limit | nll of the prompt |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for e in engines:
        if e.error:
            lines.append(f"| {e.name} | | did not run: {e.error} | | | |")
            continue
        decode, size = e.median("decode"), sizes.get(e.name)
        share = "" if decode is None or size is None else f"{100 * decode * size / limit:.0f} %"
        megabytes = "" if size is None else f"{size / 1e6:.1f}"
        row = [e.name, megabytes, cell(e.median("prefill")), cell(decode), share, cell(e.median("nll"), 4)]
        lines.append(f"| {' | '.join(row)} |")
    peers = [e for e in engines if not e.name.startswith("llmc")]
    lines.append("")
    for ours in (e for e in engines if e.name.startswith("llmc")):
        ratios = [f"{f} {ratio(ours.median(f), [p.median(f) for p in peers])}" for f in ("prefill", "decode")]
        lines.append(f"{ours.name} by the best peer: {', '.join(ratios)}.")
        lines.append("")
    quant = f" --quant {arguments.quant} --method {arguments.method}" if arguments.quant else ""
    lines += [f"    python benchmarks/cpu.py {arguments.model.name} --peers PYTHON{quant} --threads {arguments.threads}", ""]
    return "\n".join(lines)


def weight_bytes(artifact: Path) -> int:
    return sum(f.stat().st_size for f in (artifact / "weights").rglob("*") if f.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--quant", default="", help="a scheme for every matrix, the output's too")
    parser.add_argument("--method", default="rtn", help="how its matrices are rounded: rtn, awq, gptq")
    parser.add_argument("--work", type=Path, help="folder for what is built, kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    from llmc.bench import read_bandwidth

    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        artifact = compiled(arguments.model, work / "native")
        engines = [Engine("llmc", sys.executable, str(artifact))]
        if arguments.quant:
            flags = ["--quant", arguments.quant, "--keep", f"lm_head={arguments.quant}", "--method", arguments.method]
            rounded = compiled(arguments.model, work / f"{arguments.quant}-{arguments.method}", *flags)
            engines.append(Engine(f"llmc {arguments.quant}", sys.executable, str(rounded)))
        sizes = {e.name: weight_bytes(Path(e.model)) for e in engines}
        prompt = work / "prompt.json"
        prompt.write_text(json.dumps(prompt_ids(artifact)), encoding="utf-8")
        engines += [Engine(name, arguments.peers, str(arguments.model)) for name in ("llama.cpp", "openvino")]
        onnx = onnx_model(arguments.model, arguments.peers, work)
        engines.append(Engine("onnxruntime", arguments.peers, str(onnx), error="" if isinstance(onnx, Path) else onnx))
        limits = []
        for number in range(arguments.rounds):
            limits.append(read_bandwidth(arguments.threads))
            for engine in engines:
                engine.turn(arguments.threads, prompt)
                print(number, engine.name, engine.error or engine.turns[-1], flush=True)
    text = report(engines, max(limits), sizes, arguments)
    (HERE / "cpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
