"""``llmc.add``: one more variant in an artifact, over the weights it has.

The artifact is made anew beside the old one, out of links to its files and what is new, and takes its place as the last step.
Programs that have the old one open keep it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llmc import manifest, targets
from llmc.artifact import ArtifactWriter, explained, link_files
from llmc.calibration_text import calibrated
from llmc.compiler import CompileReport, build_variants, stream_weights, tuning_records
from llmc.errors import ArtifactError, UsageError
from llmc.extras import require
from llmc.importer.resolve import resolve
from llmc.manifest import Manifest
from llmc.passes.quantize.report import Row, rows
from llmc.progress import Clock, Progress, SilentProgress
from llmc.runtime.artifact import check_sizes, check_versions
from llmc.sbom import FILE_NAME as SBOM
from llmc.sbom import write_sbom
from llmc.settings import settings_from

_REPORT = "report.json"


def add(
    out: Path | str,
    *,
    target: str | Sequence[str],
    model: str | None = None,
    records: Path | None = None,
    progress: Progress | None = None,
) -> CompileReport:
    """Compile the model of the artifact ``out`` for one or several more targets (as in :func:`llmc.compile`), with the options and
    limits that the artifact was compiled with.

    Weights that a new variant stores as an old one does are shared; others (another dtype, another layout) are added under names of
    their own. ``model``: where the model is now, if it has moved. ``records``: as for :func:`llmc.compile`.

    Raises UsageError if the artifact has such a variant already, ArtifactError if it is damaged, of another version, or was made
    from another model than ``model``; else as :func:`llmc.compile`. The artifact is then as it was before.
    """
    require("compile", "compiling a model")
    folder = Path(out)
    chosen = targets.parse_all(target)
    old = manifest.read(folder)
    check_versions(old, folder)
    check_sizes(old, folder)
    taken = {v.target for v in old.variants} & {t.name for t in chosen}
    if taken:
        raise UsageError(f"the artifact {folder} has a variant for {', '.join(sorted(taken))} already: name another --target")
    clock = Clock(progress or SilentProgress())
    with ArtifactWriter(folder, force=True) as writer, explained(writer.out):
        with clock.phase("model") as phase:
            source = resolve(model or old.model.source, progress=phase.callback())
        if source.fingerprint() != old.model.fingerprint:
            raise ArtifactError(
                f"the artifact {folder} was not compiled from {model or old.model.source} as it is now (fingerprint "
                f"{source.fingerprint()[:16]}, and the manifest says {old.model.fingerprint[:16]}): name its model with "
                "--model, or compile anew"
            )
        with clock.phase("load compiler"):
            import llmc.tvm_setup  # noqa: F401  must come before anything that parses TVMScript
            from llmc.variants import HeldWeights, SharedWeights
        weights = SharedWeights(HeldWeights(folder, old.tensors))
        kept = [name for name in old.files if name not in (_REPORT, SBOM)]
        link_files(folder, writer.root, kept)
        records_used = tuning_records(records)
        with calibrated(settings_from(old), source, None, clock.progress) as settings:
            built = build_variants(source, chosen, settings, old.limits, records_used, None, clock, weights, writer.root)
            written = stream_weights(weights, clock, writer, 1 + len({t.file for t in old.tensors.values()}))
        contents = Manifest(
            llmc=old.llmc,
            tvm=old.tvm,
            model=old.model,
            kv=old.kv,
            limits=old.limits,
            graph_sha256=old.graph_sha256,
            options=old.options,
            variants=[*old.variants, *built.variants],
            tensors=old.tensors | written.tensors,
            tokenizer=old.tokenizer,
            files={name: old.files[name] for name in kept} | written.files,
        )
        lines = _write_report(folder, writer.root, rows(built.stored))
        with clock.phase("finish"):
            write_sbom(contents, writer.root)
            writer.commit(contents)
    total = sum(f.bytes for f in contents.files.values())
    return CompileReport(contents, writer.out, total, clock.seconds, built.imported.unused, lines)


def _write_report(old: Path, root: Path, new: list[Row]) -> list[Row]:
    """The artifact's report with lines for the weights that are stored in ways of their own; these lines."""
    report = json.loads((old / _REPORT).read_text(encoding="utf-8"))
    known = {(line["name"], line["scheme"]) for line in report["weights"]}
    added = [line for line in new if (line.name, line.scheme) not in known]
    report["weights"] += [asdict(line) for line in added]
    (root / _REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return added
