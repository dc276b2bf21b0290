"""``llmc.compile``: a model in, an artifact out. The order of things, and nothing else: each step lives in its own module."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import targets
from llmc.artifact import ArtifactWriter, explained, write_tokenizer
from llmc.calibration_text import calibrated
from llmc.errors import UsageError
from llmc.extras import require
from llmc.importer.resolve import resolve
from llmc.importer.source import ModelSource
from llmc.manifest import KernelChoice, Limits, Manifest, ModelInfo, Variant
from llmc.passes.choices import Choices
from llmc.passes.quantize.options import ROUND_TO_NEAREST
from llmc.passes.quantize.report import Row, Stored, rows
from llmc.paths import records_folder
from llmc.progress import Clock, Phase, Progress, SilentProgress
from llmc.sbom import write_sbom
from llmc.settings import Settings, check_positive, described, limits_of, settings_of, with_choices
from llmc.targets.base import Target, folder_name
from llmc.version import __version__

if TYPE_CHECKING:
    from llmc.importer.model import ImportedModel
    from llmc.passes.pipeline import Lowered
    from llmc.schedules.lookup import Records
    from llmc.variants import Earlier, SharedWeights
    from llmc.weights_file import Written


@dataclass
class CompileReport:
    """What a compile did. ``seconds`` by phase; ``unused``: checkpoint tensors the graph does not read; ``bytes`` on disk.
    ``weights``: how they are stored, a line for all of a kind."""

    manifest: Manifest
    out: Path
    bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    weights: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Built:
    """What compiling for several targets gave, apart from their weights. ``imported`` and ``lowered`` are the last target's."""

    variants: list[Variant]
    stored: list[Stored]
    parameters: int
    imported: ImportedModel
    lowered: Lowered


def compile(
    model: str,
    *,
    out: Path | str,
    target: str | Sequence[str] = "cpu",
    dtype: str | None = None,
    kv_dtype: str | None = None,
    quant: str | None = None,
    keep: Sequence[str] = (),
    method: str | None = None,
    target_bpw: float | None = None,
    calibration: Path | str | None = None,
    context: int | None = None,
    max_batch: int = 8,
    page_size: int | None = None,
    records: Path | None = None,
    choices: Choices | None = None,
    dump_ir: Path | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> CompileReport:
    """Compile ``model`` (a folder, a .gguf file, a known name or a hub id) for ``target`` into the folder ``out``.

    Several targets (``["cpu:x86-64-v3", "cuda:sm_80,sm_90a"]``) make variants of one artifact, which share the weights; the
    loader takes the one that suits its machine best. ``dtype``: how matrices are stored (float32, bfloat16 or float16; None: as
    the checkpoint has them, quantized ones included); sums are always float32. ``kv_dtype``: the same for the KV cache, or a
    scheme it is quantized by: int8, fp8_e4m3 or int4, see :mod:`llmc.kv_layout` (None: as ``dtype``). ``quant``: a scheme that
    matrices are rounded to (``"int4"``, ``"int8"``, ...: see :mod:`llmc.passes.quantize.scheme`); ``keep``: exceptions
    ``"NAME=SCHEME"`` with a regular expression for names and a scheme or ``none``. ``method``: how matrices are rounded:
    ``"rtn"`` to the nearest code, ``"awq"``, ``"gptq"`` or ``"smoothquant"`` by what their layers see of the text in the file
    ``calibration`` (None: a text in the public domain that comes with llmc); None: ``"rtn"``, but ``"smoothquant"`` for
    integers of 8 bits on a CPU. ``target_bpw``: bits per weight of the whole model, in the place of ``quant``. ``context``: the
    most positions a sequence may have (None: what the model was trained for). ``max_batch``: sequences in one decode step.
    ``page_size``: positions of one KV page (None: as ``choices`` has it). ``records``: a folder of tuning records to use beside
    llmc's own and those in the cache. ``choices``: what is fused, and the page size (None: as ``llmc tune`` measured for
    such models, else the defaults). ``dump_ir``: a folder for the IR after every pass.

    Raises an :class:`llmc.errors.LlmcError`; ``out`` is then as it was before.
    """
    require("compile", "compiling a model")
    clock = Clock(progress or SilentProgress())
    chosen = targets.parse_all(target)
    check_positive(max_batch=max_batch, page_size=page_size, context=context)
    with ArtifactWriter(Path(out), force=force) as writer, explained(writer.out):
        with clock.phase("model") as phase:
            source = resolve(model, progress=phase.callback())
        known = tuning_records(records)
        settings = settings_of(source, dtype, kv_dtype, quant, keep, context, max_batch, method, target_bpw, chosen)
        settings = with_choices(settings, source, chosen, known, choices, page_size)
        with calibrated(settings, source, calibration, clock.progress, optional=method is None) as settings:
            return assemble(model, source, chosen, settings, limits_of(settings, chosen), known, dump_ir, clock, writer)


def kernels(
    model: str,
    *,
    target: str = "cpu",
    dtype: str | None = None,
    kv_dtype: str | None = None,
    quant: str | None = None,
    keep: Sequence[str] = (),
    context: int | None = None,
    max_batch: int = 8,
    page_size: int | None = None,
    progress: Progress | None = None,
) -> list[KernelChoice]:
    """The kernels that compiling ``model`` for one target would take, found without making machine code or reading weights.

    Arguments and errors are those of :func:`compile`.
    """
    require("compile", "finding a model's kernels")
    clock = Clock(progress or SilentProgress())
    chosen = targets.parse(target)
    check_positive(max_batch=max_batch, page_size=page_size, context=context)
    with clock.phase("model") as phase:
        source = resolve(model, progress=phase.callback())
    with clock.phase("load compiler"):
        from llmc.schedules.lookup import Records
    settings = settings_of(source, dtype, kv_dtype, quant, keep, context, max_batch, ROUND_TO_NEAREST)
    settings = with_choices(settings, source, [chosen], Records(), None, page_size)
    imported = imported_model(source, chosen, settings, clock)
    with clock.phase("passes") as phase:
        return lower_model(imported, chosen, settings, limits_of(settings, [chosen]), Records(), None, phase).kernels


def assemble(
    model: str,
    source: ModelSource,
    chosen: Sequence[Target],
    settings: Settings,
    limits: Limits,
    records: Records,
    dump_ir: Path | None,
    clock: Clock,
    writer: ArtifactWriter,
    earlier: Earlier | None = None,
) -> CompileReport:
    """Compile ``source``, which was named ``model``, into the writer's folder. ``earlier``: what an earlier compile of the model
    has left, which is linked to where it is the same, and what this one leaves."""
    with clock.phase("load compiler"):
        import llmc.tvm_setup  # noqa: F401  must come before anything that parses TVMScript
        from llmc.variants import Earlier, SharedWeights
    with clock.phase("tokenizer"):  # before what takes minutes: the file may be damaged
        tokenizer = write_tokenizer(source, writer.root)
    earlier = earlier or Earlier()
    weights = SharedWeights(earlier)
    built = build_variants(source, chosen, settings, limits, records, dump_ir, clock, weights, writer.root, earlier.graphs)
    imported, lowered = built.imported, built.lowered
    earlier.link(writer.root)
    written = stream_weights(weights, clock, writer, 1 + len(earlier.files))
    contents = Manifest(
        llmc=__version__,
        tvm=_tvm_version(),
        model=ModelInfo(
            name=source.name,
            source=model,
            fingerprint=source.fingerprint(),
            architecture=(source.config.architectures or [source.config.model_type])[0],
            parameters=built.parameters,
            vocab_size=imported.vocab_size,
            context=settings.context,
            trained_context=imported.trained_context,
            license=source.license,
        ),
        kv=_kv_info(settings, lowered.kv_layers),
        limits=limits,
        graph_sha256=lowered.graph_sha256,
        options=described(settings),
        variants=built.variants,
        tensors=earlier.tensors | written.tensors,
        tokenizer=tokenizer,
        files=earlier.files | written.files,
    )
    lines = rows(built.stored)
    report = {"unused": imported.unused, "weights": [asdict(line) for line in lines]}
    (writer.root / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with clock.phase("finish"):
        write_sbom(contents, writer.root)
        writer.commit(contents)
    earlier.keep(writer.out, weights.table, written)
    total = sum(f.bytes for f in contents.files.values())
    return CompileReport(contents, writer.out, total, clock.seconds, imported.unused, lines)


def build_variants(
    source: ModelSource,
    chosen: Sequence[Target],
    settings: Settings,
    limits: Limits,
    records: Records,
    dump_ir: Path | None,
    clock: Clock,
    weights: SharedWeights,
    root: Path,
    graphs: dict[str, ImportedModel] | None = None,
) -> Built:
    """Compile for each target of ``chosen`` into ``root/variants``; ``weights`` then has what the artifact must store for them.
    ``graphs``: the imported model by data type of the computation, as far as it is there; the rest is added."""
    from llmc.variants import build_variant

    variants, stored = [], []
    graphs = {} if graphs is None else graphs
    for target in chosen:
        ir_folder = dump_ir if dump_ir is None or len(chosen) == 1 else dump_ir / folder_name(target)
        compute = targets.module_for(target).compute_dtype(settings.storage_dtype)
        if compute not in graphs:
            graphs[compute] = imported_model(source, target, settings, clock)
        imported = graphs[compute].copy()
        parameters = _count_parameters(imported.params)
        with clock.phase("passes") as phase:
            lowered = lower_model(imported, target, settings, limits, records, ir_folder, phase)
        with clock.phase("machine code"):
            variants.append(build_variant(lowered, target, weights.share(lowered.weights, imported.params), root))
            _copy_runtime(target, root)
        stored += lowered.stored
    for note in records.notes:
        clock.progress.note(note)
    return Built(variants, stored, parameters, imported, lowered)


def stream_weights(weights: SharedWeights, clock: Clock, writer: ArtifactWriter, first: int = 1) -> Written:
    """Write what ``weights`` must store, into files numbered from ``first`` on."""
    from llmc.weights_file import Written, write_weights

    if not len(weights.table):
        return Written({}, {})
    writer.check_room(weights.table.nbytes)
    with clock.phase("weights", weights.table.nbytes, "B") as phase:
        advance = lambda nbytes, name: phase.update(phase.done + nbytes, name)  # noqa: E731
        return write_weights(weights.table, writer.root, "weights", advance, first)


def imported_model(source: ModelSource, target: Target, settings: Settings, clock: Clock) -> ImportedModel:
    """The model's graph, of the data type that ``target`` computes in."""
    from llmc.importer.model import import_model

    with clock.phase("import graph") as phase:
        return import_model(
            source,
            storage_dtype=settings.storage_dtype,
            compute_dtype=targets.module_for(target).compute_dtype(settings.storage_dtype),
            context=settings.context,
            step=lambda what: phase.update(0, what),
        )


def tuning_records(folder: Path | None) -> Records:
    """llmc's own records, then those tuning has left in the cache, then those of ``folder``: the later count."""
    from llmc.schedules.lookup import SHIPPED, load

    if folder is not None and not folder.is_dir():
        raise UsageError(f"--records {folder} is not a folder: name one with *.jsonl files that `llmc tune` wrote")
    return load([SHIPPED, records_folder(), *([] if folder is None else [folder])])


def lower_model(
    imported: ImportedModel,
    target: Target,
    settings: Settings,
    limits: Limits,
    records: Records,
    dump_ir: Path | None,
    phase: Phase,
) -> Lowered:
    """Run the passes."""
    from llmc.passes.pipeline import Options, lower

    if settings.calibration is not None:
        settings.calibration.progress = phase.callback()
    options = Options(
        page_size=settings.page_size,
        kv_dtype=settings.kv_dtype,
        context=settings.context,
        max_batch=limits.max_batch,
        max_rows=limits.max_rows,
        max_logit_rows=limits.max_logit_rows,
        quantization=settings.quantization,
        calibration=settings.calibration,
        records=records,
        unfused=settings.unfused,
        chunks=settings.chunks,
    )
    return lower(imported.mod, imported.params, target, options, dump_ir, phase.callback())


def _copy_runtime(target: Target, root: Path) -> None:
    """Put TVM's runtime libraries beside the code they were built with, so that running needs no TVM installation (4 MB)."""
    import platform
    import sys

    import tvm

    from llmc.runtime.platforms import platform_of

    system = platform_of(target.triple)
    if system is None or sys.platform != "linux" or target.triple != f"{platform.machine()}-linux-gnu":
        return  # this machine's libraries would not run there; `llmc package` fetches the right ones
    (root / "runtime").mkdir(exist_ok=True)
    for name in system.libraries(target.kind):
        library = next(Path(tvm.__file__).parent.rglob(name))
        if not (root / "runtime" / library.name).exists():
            shutil.copy2(library, root / "runtime" / library.name)


def _tvm_version() -> str:
    import tvm

    return tvm.__version__


def _count_parameters(table: Any) -> int:
    from math import prod

    return sum(prod(p.shape) for p in table.values())


def _kv_info(settings: Settings, layers: list[Any]) -> Any:
    from llmc.manifest import KvInfo

    return KvInfo(settings.page_size, settings.kv_dtype, layers)
