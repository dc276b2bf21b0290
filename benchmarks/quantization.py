"""Accuracy of quantization schemes and methods on one model: writes ``benchmarks/quantization.md``.

    python benchmarks/quantization.py [MODEL] [--windows N] [--ways WAY,WAY,...]

Every way is compiled and evaluated as ``llmc quantize --compare`` does it, on the evaluation text that comes with llmc, beside
transformers in float32 on the same weights (dequantized, if MODEL is quantized). The table ends with the figures asked of them: how
much of rounding's perplexity increase a method leaves, and what 8 bits cost.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

from llmc.compare import Stored, compare, to_markdown
from llmc.progress import on_stderr
from llmc.texts import EVALUATION, read_text
from llmc.version import __version__

OUT = Path(__file__).with_suffix(".md")
WAYS = (
    "int4_g64",
    "int4_g64:awq",
    "int4_g64:gptq",
    "int4z_g64",
    "int4z_g64:awq",
    "int4z_g64:gptq",
    "int3z_g64:gptq",
    "4.5bpw:gptq",
    "int8",
    "w8a8:smoothquant",
    "native",
)


def increase(row: Stored) -> float:
    """Of the perplexity over the reference's, as a part of it."""
    assert row.evaluation.against is not None
    return row.evaluation.against.ratio.value - 1


def asked(rows: list[Stored]) -> list[str]:
    """One line for each figure that the rows allow."""
    by_way = {row.way: row for row in rows}
    lines = []
    for way, row in by_way.items():
        scheme, _, method = way.partition(":")
        if method in ("awq", "gptq") and scheme in by_way:
            part = increase(row) / increase(by_way[scheme])
            lines.append(f"- {way}: {part:.2f} of the increase in perplexity that rounding to nearest has (asked: at most 0.5)")
    if "int8" in by_way:
        lines.append(f"- int8: perplexity {increase(by_way['int8']):+.2%} (asked: within 0.5 %)")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--windows", type=int, help="windows of 512 tokens (default: all of the text)")
    parser.add_argument("--ways", default=",".join(WAYS), help="what to compare")
    args = parser.parse_args()
    rows = compare(
        args.model,
        args.ways.split(","),
        {"target": ["cpu"], "max_batch": 1},
        calibration=None,
        against=args.model,
        text=read_text(EVALUATION),
        windows=args.windows,
        progress=on_stderr(),
    )
    found = rows[0].evaluation
    against = found.against
    assert against is not None
    head = [
        f"# {args.model}: what quantization costs",
        "",
        f"llmc {__version__}, {date.today():%d %B %Y}: `python benchmarks/quantization.py {args.model} "
        f"--windows {found.windows} --ways {args.ways}`.",
        f"{found.tokens} tokens in {found.windows} windows of {found.window}; intervals of 95 % over windows. The reference is "
        f"transformers in float32 on the same weights: perplexity {against.perplexity.value:.2f}.",
        "",
    ]
    OUT.write_text("\n".join([*head, to_markdown(rows), "", *asked(rows), ""]), encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
