"""Every family on this machine's GPU, compiled here: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.models import REGULAR_CHANGES, check, prepare
from tests.support.tiny_models import MODELS

NAMES = [f"{kind}-odd" for kind in MODELS] + [f"{kind}-regular" for kind in REGULAR_CHANGES]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_tokens(name: str, dtype: str, tmp_path: Path) -> None:
    (artifact,) = prepare(tmp_path, "cuda", dtype, name)
    result = check(artifact)
    assert result.right, result
