"""Known messages of native code are dropped; everything else reaches standard error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmc import targets
from llmc.targets import native_messages

PROGRAM = """
import os, sys
from llmc.targets import native_messages
with native_messages.without(["no device"]):
    os.write(2, b"file.cc:7: no device\\nfile.cc:8: disk is full\\n")
    print("python", file=sys.stderr)
    os.write(2, b"file.cc:9: no device\\n")
print("after", file=sys.stderr)
"""


def test_known_lines_are_dropped_and_others_are_not() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["python", "file.cc:8: disk is full", "after"]


def test_messages_before_an_error_are_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="refused"), native_messages.without(["no device"]):
        os.write(2, b"the reason")
        raise ValueError("refused")
    os.write(2, b"!")
    assert capfd.readouterr().err == "the reason!"


def test_an_amd_target_is_described_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    target = targets.parse("rocm:gfx90a")
    assert targets.module_for(target).tvm_target(target).kind.name == "rocm"
    assert capfd.readouterr().err == ""
