"""Flags that several commands share, and the value types they are read with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from llmc.kv_layout import KV_DTYPES

DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("rtn", "awq", "gptq", "smoothquant")


def positive(text: str) -> int:
    """A whole number of at least 1, which may end in K, M or G (powers of 1024)."""
    from llmc.units import parse_count

    value = _number(text, parse_count)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 1")
    return value


def natural(text: str) -> int:
    """As :func:`positive`, or 0."""
    return 0 if text == "0" else positive(text)


def memory(text: str) -> int:
    """An amount of memory such as ``8GB`` or ``512MiB``, in bytes."""
    from llmc.units import parse_bytes

    return _number(text, parse_bytes)


def _number(text: str, parse: Callable[[str], int]) -> int:
    from llmc.errors import LlmcError

    try:
        return parse(text)
    except (LlmcError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_output(parser: argparse.ArgumentParser, *, json: str) -> None:
    """``--quiet`` and ``--json``; ``json`` says what the JSON is."""
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no statistics on stderr")
    parser.add_argument("--json", action="store_true", help=f"print {json} as JSON on stdout")


def add_compile(parser: argparse.ArgumentParser) -> None:
    """What decides how a model is compiled. ``compile``, ``run`` and ``chat`` on a model take the same flags."""
    group = parser.add_argument_group("compilation")
    group.add_argument(
        "--target",
        action="append",
        metavar="SPEC",
        help="cpu (this machine), cpu:x86-64-v3, cuda:sm_80,sm_90a, ...; may be repeated: one artifact for all (default: cpu)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="storage type of what is not quantized; of everything for a quantized model (default: its own)",
    )
    group.add_argument(
        "--quant", metavar="SCHEME", help="round matrices to int4, int8, int4_g128, fp8_e4m3, mxfp4, ... (default: as the model is)"
    )
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="NAME=SCHEME",
        help="other scheme, or none, for matrices whose name holds the regular expression NAME; may be repeated",
    )
    group.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="storage of the KV cache: floats, or codes with scales for each position and head (default: follows --dtype)",
    )
    group.add_argument("--max-batch", type=positive, default=8, metavar="N", help="sequences in one step (default: 8)")
    group.add_argument("--page-size", type=positive, metavar="N", help="positions in one KV page (default: as tuned, else 16)")


def add_method(parser: argparse.ArgumentParser) -> None:
    """How codes are found: for every command that makes weights. It changes no kernel, so ``tune`` has no use for it."""
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--method",
        choices=METHODS,
        help="how matrices are rounded: to nearest, or by what their layers see of a text (default: rtn, and smoothquant for 8-bit "
        "integers on a CPU)",
    )
    group.add_argument(
        "--target-bpw",
        type=float,
        metavar="B",
        help="a scheme for each matrix by what it loses, B bits per weight over all",
    )
    group.add_argument("--calibration", metavar="FILE", help="the text for both, UTF-8 (default: one in the public domain)")


COMPILE = ("dtype", "kv_dtype", "quant", "keep", "max_batch", "page_size")
METHOD = ("method", "target_bpw", "calibration")


def compile_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``llmc.compile`` that :func:`add_compile` and, if it was called, :func:`add_method` read."""
    chosen = {name: getattr(args, name) for name in (*COMPILE, *METHOD) if name in COMPILE or hasattr(args, name)}
    return {"target": args.target or ["cpu"], **chosen}


def add_runtime(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one per physical core)")
    group.add_argument("--context", type=positive, metavar="N", help="most positions of a sequence (default: the artifact's)")
    group.add_argument(
        "--kv-memory", type=memory, metavar="SIZE", help="memory for the KV cache, such as 2GB (default: chosen from what is free)"
    )
    group.add_argument("--recompile", action="store_true", help="compile again even if the cache holds this model")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-n",
        "--max-tokens",
        type=positive,
        metavar="N",
        help="stop after N tokens (default: until the model ends or the context is full)",
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K most likely tokens (0: all)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the most likely tokens that sum to P")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop tokens less likely than P times the likeliest")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="divide the scores of tokens already seen (1: off)"
    )
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="A", help="subtract A from tokens already generated")
    group.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="A", help="subtract A for each time a token was generated"
    )
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on when the model ends its answer")


SAMPLING = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "ignore_eos",
)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``Model.generate`` that :func:`add_sampling` read."""
    return {name: getattr(args, name) for name in SAMPLING}
