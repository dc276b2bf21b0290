"""What a compile was asked: its options checked, their defaults filled in from the model, the target and what tuning found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmc.errors import UsageError
from llmc.importer.resolve import resolve
from llmc.importer.source import ModelSource
from llmc.kv_layout import KV_DTYPES
from llmc.manifest import Limits, Manifest
from llmc.passes.choices import DEFAULT, Choices, find, model_call
from llmc.passes.quantize.options import NATIVE, NONE, ROUND_TO_NEAREST, SMOOTHQUANT, QuantOptions
from llmc.passes.quantize.scheme import scheme
from llmc.targets.base import Target

if TYPE_CHECKING:
    from llmc.passes.quantize.calibrate import Calibration
    from llmc.schedules.lookup import Records
    from llmc.schedules.protocol import KernelCall

STORAGE_DTYPES = ("float32", "bfloat16", "float16")
MAX_ROWS = {"cpu": 512}
"""Rows of one extend step by kind of target: enough that a prefill reads the weights rarely, small enough that the workspace stays
in megabytes."""
GPU_MAX_ROWS = 4096
"""The same for other kinds: a GPU is busy only with thousands of rows, and has hundreds of megabytes to spare for them."""
LARGE_GPU_MAX_ROWS = {"sm_90a": 8192}
"""The same for GPUs by architecture that have 80 GB or more: twice the workspace, for the few parts of a long prompt that each
chunk costs once more."""
MAX_LOGIT_ROWS = 128
"""Rows of one extend step that may ask for logits; a vocabulary is wide, so this bounds the largest intermediate."""


@dataclass(frozen=True)
class Settings:
    """The options of a compile once they are checked and defaults are filled in. ``choices``: where those for the whole model are
    from (:mod:`llmc.passes.choices`). ``calibration``: the text for a quantization method that looks at one."""

    storage_dtype: str
    kv_dtype: str
    quantization: QuantOptions
    context: int
    max_batch: int
    page_size: int
    unfused: frozenset[str] = DEFAULT.unfused
    chunks: int = DEFAULT.chunks
    choices: str = "default"
    calibration: Calibration | None = None


def check_positive(**values: int | None) -> None:
    """Raise UsageError for a value below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UsageError(f"{name.replace('_', ' ')} must be at least 1, and {value} was asked")


def limits_of(settings: Settings, chosen: Sequence[Target]) -> Limits:
    """The largest steps of an artifact: all its variants share them, so the target that can do least decides."""
    most = min(MAX_ROWS.get(t.kind, LARGE_GPU_MAX_ROWS.get(t.mcpu, GPU_MAX_ROWS)) for t in chosen)
    rows = min(most, settings.context * settings.max_batch)
    return Limits(settings.max_batch, max(rows, settings.max_batch), max(MAX_LOGIT_ROWS, settings.max_batch))


def default_context(config: Any) -> int:
    """The positions a model was trained for.

    Where rope frequencies change beyond an original length (longrope, dynamic scaling), the original length: one artifact has
    one set of frequencies, and the unscaled set is what the model uses on everything shorter.
    """
    trained = int(getattr(config, "max_position_embeddings", None) or 4096)
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for rope in nested:
        kind = str(rope.get("rope_type", "default"))
        original = rope.get("original_max_position_embeddings")
        if original and (kind == "longrope" or "dynamic" in kind):
            trained = min(trained, int(original))
    return trained


def settings_of(
    source: ModelSource,
    dtype: str | None,
    kv_dtype: str | None,
    quant: str | None,
    keep: Sequence[str],
    context: int | None,
    max_batch: int,
    method: str | None = None,
    target_bpw: float | None = None,
    chosen: Sequence[Target] = (),
) -> Settings:
    """The options of :func:`llmc.compile` by the same names; ``chosen``: its targets, which decide on the method if none is named.
    Raises UsageError for one that means nothing."""
    storage = dtype or source.dtype
    if storage not in STORAGE_DTYPES:
        raise UsageError(f"unknown dtype {storage!r}: choose one of {', '.join(STORAGE_DTYPES)}")
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise UsageError(f"unknown dtype {kv_dtype!r} for the KV cache: choose one of {', '.join(KV_DTYPES)}")
    trained = default_context(source.config.get_text_config())
    quantization = QuantOptions(
        quant, tuple(keep), native=dtype is None, method=method or default_method(quant, chosen), target_bpw=target_bpw
    )
    return Settings(storage, kv_dtype or storage, quantization, context or trained, max_batch, DEFAULT.page_size)


def default_method(quant: str | None, chosen: Sequence[Target]) -> str:
    """Rounding to nearest; but SmoothQuant first where a CPU is to run weights of 8 bits: it rounds their inputs to 8 bits, too."""
    if quant not in (None, NONE, NATIVE) and any(target.kind == "cpu" for target in chosen):
        how = scheme(quant)
        if how.kind == "int" and how.bits == 8:
            return SMOOTHQUANT
    return ROUND_TO_NEAREST


def whole_model_of(model: str, **compiling: Any) -> KernelCall:
    """What records of ``model`` as a whole are kept under, compiled with these arguments of :func:`compile`."""
    source = resolve(model)
    dtype, kv_dtype, quant = (compiling.get(name) for name in ("dtype", "kv_dtype", "quant"))
    return whole_model(source, settings_of(source, dtype, kv_dtype, quant, compiling.get("keep", ()), None, 1))


def whole_model(source: ModelSource, settings: Settings) -> KernelCall:
    """What records of the model as a whole are kept under."""
    config = source.config.get_text_config()
    hidden, vocab, layers = (int(getattr(config, n, None) or 0) for n in ("hidden_size", "vocab_size", "num_hidden_layers"))
    stored = settings.quantization.default
    return model_call(hidden, vocab, layers, settings.storage_dtype if stored == NONE else stored)


def with_choices(
    settings: Settings,
    source: ModelSource,
    chosen: Sequence[Target],
    records: Records,
    choices: Choices | None,
    page_size: int | None,
) -> Settings:
    """The settings with what is fused and the page size: as asked, else as records have it for the model.

    Several targets share their weights, which those of a target that folds norms are not (:mod:`llmc.passes.fold_gain`), and their
    pages, and nothing was measured for all of them together.
    """
    origin = "default"
    if choices is None and len(chosen) == 1:
        choices, origin = find(records, whole_model(source, settings), chosen[0])
    choices = choices or replace(DEFAULT, norm=False)
    return replace(
        settings, page_size=page_size or choices.page_size, unfused=choices.unfused, chunks=choices.chunks, choices=origin
    )


def described(settings: Settings) -> dict[str, Any]:
    """The options as a manifest has them; :func:`settings_from` reads them back."""
    options = {"dtype": settings.storage_dtype, "kv_dtype": settings.kv_dtype, **settings.quantization.described()}
    if settings.calibration is not None and not settings.calibration.own:
        options["calibration"] = "a text of the user's"
    if settings.choices != "default":
        options["choices"] = settings.choices
    if settings.unfused != DEFAULT.unfused:
        options["unfused"] = sorted(settings.unfused)
    if settings.chunks != DEFAULT.chunks:
        options["chunks"] = settings.chunks
    return options


def settings_from(m: Manifest) -> Settings:
    """The options of the compile that made an artifact. Raises UsageError for one whose weights depend on a text of the user's."""
    if "calibration" in m.options:
        raise UsageError(
            f"how the weights of {m.model.name} were quantized depends on a text that the artifact does not hold: "
            "compile the model for all targets at once (--target may be repeated)"
        )
    quant, keep = m.options.get("quant", NONE), tuple(m.options.get("keep", ()))
    options = QuantOptions(
        None if quant in (NATIVE, NONE) else quant,
        keep,
        native=quant == NATIVE,
        method=m.options.get("method", ROUND_TO_NEAREST),
        target_bpw=m.options.get("target_bpw"),
    )
    return Settings(
        m.options["dtype"],
        m.options["kv_dtype"],
        options,
        m.model.context,
        m.limits.max_batch,
        m.kv.page_size,
        frozenset(m.options.get("unfused", DEFAULT.unfused)),
        m.options.get("chunks", DEFAULT.chunks),
        m.options.get("choices", "default"),
    )
