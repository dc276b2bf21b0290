"""What methods of quantization see of a text: its windows of tokens, by the model's own tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llmc.artifact import write_tokenizer
from llmc.errors import UsageError
from llmc.importer.source import ModelSource
from llmc.passes.quantize.options import ROUND_TO_NEAREST, SMOOTHQUANT
from llmc.progress import Progress
from llmc.settings import Settings

CALIBRATION_WINDOW, CALIBRATION_WINDOWS, SMOOTHING_WINDOWS = 512, 32, 2
"""Tokens of one window of calibration text, and how many windows are taken, spread over the text: few to see how large each channel
of activations is, which hardly depends on the text."""


@contextmanager
def calibrated(
    settings: Settings, source: ModelSource, text: Path | str | None, progress: Progress, *, optional: bool = False
) -> Iterator[Settings]:
    """The settings with windows of the calibration text and a folder for what is made of it, if their method needs that.

    ``optional``: matrices are rounded to nearest, with a note, if the model has no tokenizer to read the text with.
    """
    asked = settings.quantization
    if not asked.calibrated:
        if text is not None:
            raise UsageError(f"nothing reads the calibration text {text} with --method rtn and no --target-bpw")
        yield settings
        return
    import numpy as np

    from llmc.passes.quantize.calibrate import Calibration
    from llmc.runtime.tokenizer import Tokenizer
    from llmc.texts import CALIBRATION, read_text, windows

    content = read_text(CALIBRATION if text is None else Path(text))
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        files = write_tokenizer(source, Path(folder))
        if files is None and optional and asked.target_bpw is None and text is None:
            progress.note(f"{source.name} has no tokenizer, so no text says how large its activations are: --method rtn it is")
            yield replace(settings, quantization=replace(asked, method=ROUND_TO_NEAREST))
            return
        if files is None:
            raise UsageError(f"{source.name} has no tokenizer, so no calibration text can be read: use --quant with --method rtn")
        ids = Tokenizer(Path(folder), files).encode(content)
        bos = files.bos_token_id if ids and ids[0] == files.bos_token_id else None
        length = min(CALIBRATION_WINDOW, settings.context)
        if len(ids) < length:
            raise UsageError(
                f"the calibration text {text} has {len(ids)} tokens, and {length} are read at a time: give a longer one"
            )
        cut = windows(ids, length, SMOOTHING_WINDOWS if asked.method == SMOOTHQUANT else CALIBRATION_WINDOWS, bos)
        yield replace(settings, calibration=Calibration(np.array(cut), Path(folder), own=text is None))
