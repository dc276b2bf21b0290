"""``llmc doctor``: what is here, what is missing, and the command for it."""

from __future__ import annotations

import json

import pytest

from llmc import doctor, extras
from tests.cli.conftest import Llmc


def test_report_of_this_machine(llmc: Llmc) -> None:
    found = json.loads(llmc("doctor", "--json").stdout)
    versions = {p["name"]: p["version"] for p in found["packages"]}
    assert versions["numpy"] and versions["apache-tvm"].startswith("0.27")
    host = found["targets"][0]
    assert host["target"].startswith("cpu = cpu:") and host["builds"] and host["runs"]
    foreign = [t for t in found["targets"] if "aarch64" in t["target"]]
    assert foreign and all(t["why"] for t in found["targets"] if not (t["builds"] and t["runs"]))
    assert found["memory_total"] > found["memory_available"] > 0
    assert found["fixes"] == []


def test_text_names_the_host(llmc: Llmc) -> None:
    done = llmc("doctor")
    assert done.returncode == 0 and "nothing is missing" in done.stdout and "builds, runs here" in done.stdout


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("torch", "rich") else real(name))
    monkeypatch.setattr(extras, "missing", lambda extra: ["torch"])
    report = doctor.examine()
    assert report.fixes == ["pip install rich", 'pip install "llmc[compile]"']
    assert report.targets == []
    text = doctor.render(report)
    assert "torch              missing" in text and 'to mend: pip install "llmc[compile]"' in text
