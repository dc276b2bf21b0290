"""Verdicts on records, for tests of what compiles take."""

from __future__ import annotations

from llmc.schedules.records import Record, Verdict


def verdict(record: Record, kept: bool = True) -> Verdict:
    """That a model gained, or lost, by the record's configuration."""
    return Verdict(
        record.family, record.call, record.target, record.machine, record.device, record.config, kept,
        1.05 if kept else 0.9, "a model", record.source, record.versions,
    )  # fmt: skip
