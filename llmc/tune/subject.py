"""The model that is tuned, to be compiled again and again: imported once, its weights written once and linked to."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmc.artifact import ArtifactWriter, explained
from llmc.errors import ArtifactError, UsageError
from llmc.importer.resolve import resolve
from llmc.importer.source import ModelSource
from llmc.manifest import FILE_NAME, KernelChoice, Limits, Manifest, read
from llmc.passes.choices import UNFUSABLE, Choices
from llmc.passes.quantize.options import ROUND_TO_NEAREST, SMOOTHQUANT
from llmc.progress import Clock, Progress, SilentProgress
from llmc.schedules.lookup import Records
from llmc.schedules.protocol import KernelCall
from llmc.settings import Settings, limits_of, settings_from, settings_of, whole_model, with_choices
from llmc.targets.base import Target
from llmc.tune.task import STEP_ROWS


@dataclass(frozen=True)
class _Asked:
    """What is compiled and how. ``page_size``, ``choices``: None as records have them for the model."""

    name: str
    source: ModelSource
    settings: Settings
    limits: Limits
    page_size: int | None
    choices: Choices | None = None


class Subject:
    """A model or an artifact's model, on one target. A context manager: what it keeps is on disk, in a folder of its own."""

    def __init__(self, model: str, target: Target, compiling: dict[str, Any], progress: Progress) -> None:
        """``compiling``: keyword arguments of :func:`llmc.compile`; of an artifact its own options count.

        Raises what compiling raises; ArtifactError for an artifact that was made for another target or of another model than there
        is now; UsageError for one whose weights depend on a text.
        """
        from llmc.variants import Earlier

        self.target, self.progress = target, progress
        with progress.phase("model") as phase:
            is_artifact = (Path(model) / FILE_NAME).is_file()
            self._asked = (
                _of_artifact(Path(model), target) if is_artifact else _of_model(model, target, compiling, phase.callback())
            )
        self._folder = tempfile.TemporaryDirectory(prefix="llmc-tune-")
        self.folder = Path(self._folder.name)
        (self.folder / "weights").mkdir()
        self.earlier = Earlier(self.folder / "weights")

    @property
    def name(self) -> str:
        return self._asked.source.name

    @property
    def call(self) -> KernelCall:
        """What the choices for the whole model are kept under."""
        return whole_model(self._asked.source, self._asked.settings)

    @property
    def limits(self) -> Limits:
        """The largest steps of what :meth:`build` makes: many sequences too, since kernels are tuned for them."""
        limits = self._asked.limits
        batch = limits.max_batch if self.target.kind == "cpu" else max(limits.max_batch, STEP_ROWS)
        return replace(
            limits, max_batch=batch, max_rows=max(limits.max_rows, batch), max_logit_rows=max(limits.max_logit_rows, batch)
        )

    def kernels(self) -> list[KernelChoice]:
        """The kernels of the model as compiling takes them without any records."""
        from llmc.compiler import imported_model, lower_model

        clock, settings = Clock(self.progress), self._settings(Records(), None)
        graphs = self.earlier.graphs
        imported = imported_model(self._asked.source, self.target, settings, clock)
        graphs[_compute(self.target, settings)] = imported.copy()
        with clock.phase("passes") as phase:
            return lower_model(imported, self.target, settings, self.limits, Records(), None, phase).kernels

    def build(self, records: Records, folder: Path, choices: Choices | None = None) -> Manifest:
        """Compile it with the configurations and, unless given, the choices that ``records`` have for it."""
        from llmc.compiler import assemble

        asked = self._asked
        with ArtifactWriter(folder, force=True) as writer, explained(writer.out):
            settings, clock = self._settings(records, choices), Clock(SilentProgress())
            return assemble(
                asked.name, asked.source, [self.target], settings, self.limits, records, None, clock, writer, self.earlier
            ).manifest

    def _settings(self, records: Records, choices: Choices | None) -> Settings:
        asked = self._asked
        return with_choices(asked.settings, asked.source, [self.target], records, choices or asked.choices, asked.page_size)

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _compute(target: Target, settings: Settings) -> str:
    from llmc import targets

    return targets.module_for(target).compute_dtype(settings.storage_dtype)


def _of_model(model: str, target: Target, compiling: dict[str, Any], progress: Any) -> _Asked:
    source = resolve(model, progress=progress)
    options = {"dtype": None, "kv_dtype": None, "quant": None, "keep": (), "context": None, "max_batch": 8, **compiling}
    page_size = options.pop("page_size", None)
    settings = settings_of(source, **options)
    return _Asked(model, source, settings, limits_of(settings, [target]), page_size)


def _of_artifact(folder: Path, target: Target) -> _Asked:
    m = read(folder)
    made = [v.target for v in m.variants]
    if target.name not in made:
        raise ArtifactError(
            f"the artifact {folder} has no variant for {target.name} (it has {', '.join(made)}): name one of them with --target"
        )
    if m.options.get("method", SMOOTHQUANT) != SMOOTHQUANT:
        raise UsageError(
            f"the weights of the artifact {folder} depend on a text that it does not hold: tune the model that it was compiled "
            "from, with the scheme of its --quant"
        )
    source = resolve(m.model.source)
    if source.fingerprint() != m.model.fingerprint:
        raise ArtifactError(
            f"the artifact {folder} was not compiled from {m.model.source} as it is now: compile it anew, or tune the model"
        )
    settings = settings_from(m)
    settings = replace(
        settings, quantization=replace(settings.quantization, method=ROUND_TO_NEAREST)
    )  # other scales, the same code
    fused = {name: name not in settings.unfused for name in UNFUSABLE}
    return _Asked(m.model.source, source, settings, m.limits, None, Choices(settings.page_size, chunks=settings.chunks, **fused))
