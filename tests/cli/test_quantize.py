"""``llmc quantize --compare``, and the flags of methods and budgets on ``llmc compile``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.compare import Stored, options_of, to_markdown
from llmc.evaluate import Divergence, Estimate, Evaluation
from tests.cli.conftest import Llmc
from tests.cli.test_eval import TEXT


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("int4_g64", {"quant": "int4_g64"}),
        ("int4_g64:gptq", {"quant": "int4_g64", "method": "gptq"}),
        ("4.5bpw", {"target_bpw": 4.5}),
        ("5bpw:awq", {"target_bpw": 5.0, "method": "awq"}),
        ("native", {"dtype": None, "quant": None}),
        ("none", {"dtype": "float32", "quant": "none"}),
    ],
)
def test_what_a_way_stands_for(way: str, options: dict[str, object]) -> None:
    assert options_of(way) == options


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        (("quantize", "MODEL", "--compare", "int4,int9"), 2, "unknown quantization scheme 'int9'"),
        (("quantize", "MODEL", "--compare", "int4:magic"), 2, "there is no method 'magic'"),
        (("quantize", "MODEL", "--compare", "native:gptq"), 2, "--method gptq has nothing to round"),
        (("quantize", "MODEL", "--compare", ","), 2, "--compare names nothing"),
        (("quantize", "MODEL"), 2, "--compare"),
        (("compile", "MODEL", "-o", "OUT", "--method", "awq"), 2, "--method awq has nothing to round"),
        (("compile", "MODEL", "-o", "OUT", "--quant", "int4", "--target-bpw", "4.5"), 2, "give one"),
        (("compile", "MODEL", "-o", "OUT", "--quant", "int4", "--calibration", "TEXT"), 2, "nothing reads the calibration text"),
        (
            ("compile", "MODEL", "-o", "OUT", "--quant", "int4", "--method", "gptq", "--calibration", "none.txt"),
            2,
            "none.txt cannot be",
        ),
        (("compile", "MODEL", "-o", "OUT", "--quant", "int4", "--method", "gptq", "--calibration", "TEXT"), 2, "give a longer one"),
    ],
)
def test_what_is_refused(
    llmc_here: Llmc, tiny_model_dir: Callable[..., Path], tmp_path: Path, command: tuple[str, ...], status: int, words: str
) -> None:
    (tmp_path / "short.txt").write_text("A short text.", encoding="utf-8")
    named = {"MODEL": tiny_model_dir("llama"), "OUT": tmp_path / "out", "TEXT": tmp_path / "short.txt"}
    done = llmc_here(*(named.get(word, word) for word in command))
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_the_table_has_divergences_where_there_is_a_reference() -> None:
    one = Estimate(1.0, 0.5, 2.0)
    beside = Evaluation(10, 3, 4, one, Estimate(20.0, 18.0, 22.0), Divergence(one, Estimate(1.01, 1.0, 1.02), one, one))
    text = to_markdown([Stored("int4", 1_500_000, 4.25, 12.34, beside)])
    assert "| int4 | 4.25 | 1.5 MB | 12.3 | 20.00 (18.00-22.00) | 1.010 (1.000-1.020) | 1.0000 (0.5000-2.0000) |" in text
    alone = Evaluation(10, 3, 4, one, one, None)
    assert "KL" not in to_markdown([Stored("int4", 1_500_000, 4.25, 12.34, alone)])


@pytest.mark.slow
def test_a_comparison(llmc_here: Llmc, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Three compiles of a small model; 8 bits are nearer to it than 3, and GPTQ's 3 than those of rounding."""
    (tmp_path / "own.txt").write_text(TEXT * 40, encoding="utf-8")
    model = tiny_model_dir("llama")
    command = ("quantize", model, "--compare", "int3_g32,int3_g32:gptq,int8", "--against", model, "--windows", 8)
    done = llmc_here(*command, "--text", tmp_path / "own.txt", "--calibration", tmp_path / "own.txt", "--json")
    assert done.returncode == 0, done.stderr
    plain, careful, fine = json.loads(done.stdout)
    assert [row["way"] for row in (plain, careful, fine)] == ["int3_g32", "int3_g32:gptq", "int8"]
    kl = [row["evaluation"]["against"]["kl"]["value"] for row in (plain, careful, fine)]
    assert kl[2] < 0.1 * kl[0] and kl[1] < 0.8 * kl[0]
    assert plain["bytes"] == careful["bytes"] < fine["bytes"] and plain["decode"] > 0
