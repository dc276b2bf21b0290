"""The artifact's ``manifest.json``: what the compiler promises and the loader checks. Thin: no compiler import.

An artifact is a directory::

    manifest.json                     this file's Manifest
    variants/<name>/lib.so            one compiled module per target
    weights/weights-00001.safetensors shared by the variants; tensor data starts 64-byte aligned (``__pad`` tensors fill holes)
    tokenizer/tokenizer.json, tokenizer/chat_template.jinja
    report.json                       per-pass timing, per-call kernel choice, per-tensor error: for people and ``inspect``

The module ABI, version 1 (all tensors are the caller's; ``*`` are lists in the order of ``Variant.weights``)::

    decode(out [b, vocab] f32, input_ids [b] i32, positions [b] i32, slot_mapping [b] i32, q_indptr [b+1] i32, seq_lens [b] i32,
           block_table [b, m] i32, *kv_pages, *weights)
    extend(out [r, vocab] f32, input_ids [n] i32, positions [n] i32, slot_mapping [n] i32, q_indptr [b+1] i32, seq_lens [b] i32,
           block_table [b, m] i32, logit_rows [r] i32, *kv_pages, *weights)

``logit_rows``: the rows of the n with logits, in order, and of each sequence its last ones.
``kv_pages[l]`` is ``[num_pages, heads, width]``, width and dtype as :mod:`llmc.kv_layout` says; see :mod:`llmc.dialect.paged` for
what the state tensors mean.

On a GPU the module chooses tokens too. The next two after ``decode`` make a step that needs nothing of the host, and leave the
arrays of the next one behind; ``sample`` alone follows ``extend``. Arguments marked ``*`` are changed in place::

    sample(tokens [s] i32, logits [r, vocab] f32, draws [s, 12] i32, positions [s] i32, counts* [slots, vocab] i16)
    advance(slot_mapping [b] i32, tokens [b] i32, input_ids* [b] i32, positions* [b] i32, seq_lens* [b] i32, block_table [b, m] i32)

``draws``: a record for each token to choose (:mod:`llmc.runtime.draws`), which names its row of ``logits`` and of ``counts``;
``positions``: where in its sequence the token will stand, which after ``decode`` is ``seq_lens``. A token of -1: the logits were
not finite.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.errors import ArtifactError
from llmc.kv_layout import SCHEMES, PageLayout, page_dtype, page_layout

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass
class ModelInfo:
    """The source model. ``context``: the most positions a sequence may have here; ``trained_context``: what it was made for;
    ``license``: as the model names its own, None if it does not."""

    name: str
    source: str
    fingerprint: str
    architecture: str
    parameters: int
    vocab_size: int
    context: int
    trained_context: int
    license: str | None = None


@dataclass
class KvLayer:
    """The KV cache of one attention layer; ``window`` is -1 for full attention (positions, not bytes)."""

    heads: int
    k_dim: int
    v_dim: int
    window: int = -1


@dataclass
class KvInfo:
    """The KV cache: ``page_size`` in positions, ``dtype`` of the stored values or the scheme they are quantized by
    (:data:`llmc.kv_layout.KV_DTYPES`)."""

    page_size: int
    dtype: str
    layers: list[KvLayer]

    def layout(self, layer: KvLayer) -> PageLayout:
        """What a page of ``layer`` holds for each of its heads."""
        return page_layout(self.dtype, self.page_size, layer.k_dim, layer.v_dim)

    @property
    def page_dtype(self) -> str:
        """The dtype of the page tensors."""
        return page_dtype(self.dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all layers, parameters of a scheme included."""
        return sum(layer.heads * self.layout(layer).nbytes for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position of one sequence takes over all layers, rounded up where a page does not divide."""
        return -(-self.page_bytes // self.page_size)

    @property
    def bits(self) -> float:
        """Bits of a stored number on average, parameters included."""
        numbers = self.page_size * sum(layer.heads * (layer.k_dim + layer.v_dim) for layer in self.layers)
        return 8 * self.page_bytes / numbers if numbers else 0.0

    @property
    def storage(self) -> str:
        """How keys and values are stored, for people: ``float16``, ``int8 (8.25 bits)``."""
        return f"{self.dtype} ({self.bits:.4g} bits)" if self.dtype in SCHEMES else self.dtype


@dataclass
class Limits:
    """Upper bounds the memory plan was made for: sequences in a step, rows in an extend step, logit rows in an extend step."""

    max_batch: int
    max_rows: int
    max_logit_rows: int


@dataclass
class KernelChoice:
    """One distinct kernel: which family took which op, how often a call of ``function`` runs it, and why.

    ``tuned``: where the configuration is from, ``"record: ..."``, ``"nearest: ..."`` or ``"default"``; ``call``: the call as
    :func:`llmc.schedules.records.call_to_json` writes it. Both are empty for a kernel that no family made.
    """

    function: str
    op: str
    kernel: str
    family: str
    count: int
    shape: str
    config: dict[str, Any]
    why: str
    tuned: str = ""
    call: dict[str, Any] = field(default_factory=dict)


@dataclass
class FunctionInfo:
    """A compiled function. ``workspace_bytes``: planned intermediate memory at the upper bounds; ``storages``: its pieces."""

    name: str
    workspace_bytes: int
    kernels: int
    storages: list[int] = field(default_factory=list)


@dataclass
class Variant:
    """One compiled module. ``weights`` names its weight arguments in order; ``features`` are CPU features it needs."""

    name: str
    target: str
    kind: str
    triple: str
    mcpu: str
    features: list[str]
    library: str
    functions: list[FunctionInfo]
    weights: list[str]
    kernels: list[KernelChoice]


@dataclass
class TensorInfo:
    """One stored weight: its file (relative to the artifact), dtype name, shape, the scheme it is stored by here, and the one
    it had in the checkpoint (``"Q4_1"``)."""

    file: str
    dtype: str
    shape: list[int]
    scheme: str
    source: str


@dataclass
class TokenizerFiles:
    """Paths relative to the artifact, and the ids generation stops at."""

    file: str
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: list[int]
    pad_token_id: int | None
    bos_token: str
    eos_token: str


@dataclass
class FileInfo:
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """Everything about an artifact. ``files`` lists every file but the manifest itself."""

    llmc: str
    tvm: str
    model: ModelInfo
    kv: KvInfo
    limits: Limits
    graph_sha256: str
    options: dict[str, Any]
    variants: list[Variant]
    tensors: dict[str, TensorInfo]
    tokenizer: TokenizerFiles | None
    files: dict[str, FileInfo] = field(default_factory=dict)
    format: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def _build(cls: type, value: dict[str, Any]) -> Any:
    return cls(**{f.name: value[f.name] for f in dataclasses.fields(cls) if f.name in value})


def parse(text: str, where: str) -> Manifest:
    """The manifest in ``text``. Raises ArtifactError if it is not JSON, of another format version, or lacks a field."""
    try:
        raw = json.loads(text)
        found = raw["format"]
        if found != FORMAT_VERSION:
            raise ArtifactError(
                f"the artifact {where} has manifest format {found}, and this llmc reads format {FORMAT_VERSION}: "
                f"recompile the model with this llmc, or install the llmc that built it ({raw.get('llmc', 'unknown')})"
            )
        kv = _build(KvInfo, raw["kv"])
        kv.layers = [_build(KvLayer, v) for v in raw["kv"]["layers"]]
        variants = []
        for v in raw["variants"]:
            variant = _build(Variant, v)
            variant.functions = [_build(FunctionInfo, f) for f in v["functions"]]
            variant.kernels = [_build(KernelChoice, k) for k in v["kernels"]]
            variants.append(variant)
        tokenizer = raw["tokenizer"]
        return Manifest(
            llmc=raw["llmc"],
            tvm=raw["tvm"],
            model=_build(ModelInfo, raw["model"]),
            kv=kv,
            limits=_build(Limits, raw["limits"]),
            graph_sha256=raw["graph_sha256"],
            options=raw["options"],
            variants=variants,
            tensors={k: _build(TensorInfo, v) for k, v in raw["tensors"].items()},
            tokenizer=None if tokenizer is None else _build(TokenizerFiles, tokenizer),
            files={k: _build(FileInfo, v) for k, v in raw["files"].items()},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"the manifest of {where} is damaged ({type(error).__name__}: {error}): recompile the model") from error


def read(folder: Path) -> Manifest:
    """The manifest of the artifact in ``folder``. Raises ArtifactError if there is none or it cannot be used."""
    path = folder / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        found = "no such folder" if not folder.exists() else "no manifest.json in it"
        raise ArtifactError(
            f"{folder} is not an llmc artifact ({found}): build one with `llmc compile MODEL -o {folder}`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"the manifest {path} cannot be read ({error}): recompile the model") from error
    return parse(text, str(folder))
