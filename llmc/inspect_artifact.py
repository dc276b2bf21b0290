"""What an artifact is, from its manifest alone: no weight is read, and devices are only asked what they are."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc import manifest
from llmc.errors import ArtifactError, RequestError
from llmc.manifest import KvLayer, Manifest, TensorInfo
from llmc.passes.quantize.report import Row, table
from llmc.runtime.artifact import choose_variant, gpus_of
from llmc.runtime.footprint import footprint
from llmc.runtime.host import host
from llmc.units import format_bytes, format_count, format_parameters


@dataclass
class MemoryPlan:
    """Where memory goes when one artifact runs; bytes, and positions for the contexts."""

    weights_bytes: int
    workspace_bytes: int
    buffers_bytes: int
    kv_bytes_per_token: int
    context: int
    kv_bytes_full_context: int
    memory: int | None = None
    max_context: int | None = None


def plan_memory(info: Manifest, memory: int | None = None) -> MemoryPlan:
    """The memory plan; with ``memory`` (bytes), the longest context of one sequence that fits, in whole pages.

    Of several variants the one that takes most counts. Raises RequestError if not even one page fits.
    """
    needs = max((footprint(info, v) for v in info.variants), key=lambda f: f.total)
    page_bytes, page = info.kv.page_bytes, info.kv.page_size
    full = -(-info.model.context // page) * page_bytes
    plan = MemoryPlan(needs.weights, needs.workspace, needs.buffers, info.kv.bytes_per_token, info.model.context, full)
    if memory is not None:
        pages = (memory - needs.total) // page_bytes
        if pages < 1:
            raise RequestError(
                f"{format_bytes(memory)} do not hold this model: its weights take {format_bytes(needs.weights)}, its workspace "
                f"{format_bytes(needs.workspace)}, logits and other buffers {format_bytes(needs.buffers)}, and one page of the KV "
                f"cache {format_bytes(page_bytes)}"
            )
        plan.memory = memory
        plan.max_context = min(pages * page, info.model.context)
    return plan


def _here(info: Manifest, folder: Path) -> str:
    """Which variant this machine would run and why, or why none."""
    try:
        return choose_variant(info, folder, host(), gpus_of({v.kind for v in info.variants}))[1]
    except ArtifactError as error:
        return str(error)


def describe(folder: Path, memory: int | None = None) -> dict[str, Any]:
    """Everything ``llmc inspect`` shows, as plain data. Raises ArtifactError if ``folder`` holds no readable artifact."""
    info = manifest.read(folder)
    schemes = Counter(_storage(t) for t in info.tensors.values())
    return {
        "path": str(folder),
        "format": info.format,
        "llmc": info.llmc,
        "tvm": info.tvm,
        "model": asdict(info.model),
        "options": info.options,
        "graph_sha256": info.graph_sha256,
        "kv": {**asdict(info.kv), "bytes_per_token": info.kv.bytes_per_token},
        "limits": asdict(info.limits),
        "tensors": {"count": len(info.tensors), "schemes": dict(schemes)},
        "weights": [asdict(row) for row in _weights(folder)],
        "tokenizer": None if info.tokenizer is None else asdict(info.tokenizer),
        "variants": [asdict(v) for v in info.variants],
        "here": _here(info, folder),
        "memory": asdict(plan_memory(info, memory)),
        "bytes": sum(f.bytes for f in info.files.values()),
    }


def render(folder: Path, memory: int | None = None) -> str:
    """The same for people: one fact a line, one line a kernel."""
    info = manifest.read(folder)
    plan = plan_memory(info, memory)
    model = info.model
    schemes = Counter(_storage(t) for t in info.tensors.values())
    chat = "none" if info.tokenizer is None else ("with a chat template" if info.tokenizer.chat_template else "no chat template")
    lines = [
        f"{model.name}  ({model.architecture}, {format_parameters(model.parameters)} parameters, vocabulary {model.vocab_size})",
        _row("source", model.source),
        _row("fingerprint", model.fingerprint[:16]),
        _row("graph", info.graph_sha256[:16]),
        _row("built by", f"llmc {info.llmc}, TVM {info.tvm}, artifact format {info.format}"),
        _row("options", ", ".join(f"{k}={v}" for k, v in info.options.items()) or "defaults"),
        _row("files", f"{len(info.files)}, {format_bytes(sum(f.bytes for f in info.files.values()))}"),
        _row("tensors", f"{len(info.tensors)} ({', '.join(f'{n} {s}' for s, n in schemes.most_common())})"),
        _row("tokenizer", chat),
        _row("here", _here(info, folder)),
        _row("context", f"{format_count(model.context)} positions (trained for {format_count(model.trained_context)})"),
        _row(
            "one step",
            f"up to {info.limits.max_batch} sequences, {info.limits.max_rows} rows, {info.limits.max_logit_rows} rows of logits",
        ),
        "",
        "memory",
        _row("weights", format_bytes(plan.weights_bytes)),
        _row("workspace", f"{format_bytes(plan.workspace_bytes)} at the limits above"),
        _row("buffers", f"{format_bytes(plan.buffers_bytes)} for logits and the arguments of a step"),
        _row(
            "kv per token",
            f"{plan.kv_bytes_per_token} B ({info.kv.storage}, {_layers(info.kv.layers)}, pages of {info.kv.page_size})",
        ),
        _row("full context", f"{format_bytes(plan.kv_bytes_full_context)} of KV for one sequence"),
    ]
    if plan.max_context is not None and memory is not None:
        whole = " (all of it)" if plan.max_context == plan.context else ""
        lines.append(_row(f"in {format_bytes(memory)}", f"a context of {plan.max_context} positions{whole}"))
    if stored := _weights(folder):
        lines += ["", *(f"  {line}" for line in table(stored))]
    for variant in info.variants:
        needs = f"needs {' '.join(variant.features)}" if variant.features else "needs no special CPU feature"
        lines += ["", f"variant {variant.name}: {variant.target} ({variant.triple}, {variant.mcpu}); {needs}"]
        for function in variant.functions:
            lines.append(_row(function.name, f"{function.kernels} kernels, workspace {format_bytes(function.workspace_bytes)}"))
            chosen = [k for k in variant.kernels if k.function == function.name]
            lines += [f"    {k.count:>4} × {k.kernel}  {k.op}{k.shape}  [{k.family}: {k.why}]" for k in chosen]
    return "\n".join(lines)


def _weights(folder: Path) -> list[Row]:
    """How the weights are stored, from the artifact's report; empty if it has none."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return [Row(**row) for row in report["weights"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _storage(tensor: TensorInfo) -> str:
    """How a tensor is stored, and what it was if that is something else: ``float16 from Q4_1``."""
    return tensor.scheme if tensor.scheme == tensor.source else f"{tensor.scheme} from {tensor.source}"


def _row(label: str, value: str) -> str:
    return f"  {label:<13} {value}"


def _layers(layers: list[KvLayer]) -> str:
    """The KV layers by kind, each once: ``30 layers of 3 × (64 + 64)``."""
    kinds = Counter((v.heads, v.k_dim, v.v_dim, v.window) for v in layers)
    return ", ".join(
        f"{n} layer{'s' if n > 1 else ''} of {h} × ({k} + {v})" + (f" in a window of {w}" if w >= 0 else "")
        for (h, k, v, w), n in kinds.items()
    )
