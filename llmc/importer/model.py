"""A model source in, the flat graph and its parameter table out: the importer's one entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import tvm

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.aten import convert
from llmc.importer.export import build_model, export_model
from llmc.importer.params import ParamTable
from llmc.importer.report import raise_unsupported
from llmc.importer.source import Binding, ModelSource
from llmc.importer.walker import Walker

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class ImportedModel:
    """``mod`` has one function ``main(input_ids [n] i32, positions [n] i32, *params) -> logits [n, vocab] f32``, whose parameters
    are named as in ``params``. ``unused``: checkpoint tensors the graph does not read."""

    mod: tvm.IRModule
    params: ParamTable
    vocab_size: int
    trained_context: int
    unused: list[str] = field(default_factory=list)

    def copy(self) -> ImportedModel:
        """The same graph with a table of its own, which passes may change."""
        return replace(self, params=self.params.copy())


def import_model(
    source: ModelSource,
    *,
    storage_dtype: str,
    compute_dtype: str = "float32",
    context: int,
    step: Callable[[str], None] = lambda _: None,
) -> ImportedModel:
    """Export and walk ``source``. ``step`` is told what is being done.

    Raises UnsupportedError listing everything the graph holds that has no conversion, and ModelError listing the parameters
    that the graph needs and the checkpoint lacks; both before any compile work.
    """
    step("reading tensor headers")
    model = build_model(source.config, TORCH_DTYPES[compute_dtype])
    binding = source.bind(model)  # before tracing: a checkpoint that stores both halves of a tied pair may untie them
    step("tracing the model")
    exported = export_model(source.config, model, context=context)
    step("building the graph")
    walker = Walker(exported.program, binding.table, binding.tied, exported.buffers, storage_dtype, compute_dtype, convert)
    mod = walker.run()
    raise_unsupported(source.name, walker.problems)
    _check_complete(source, binding, walker.missing)
    if walker.attention_layers == 0:
        raise UnsupportedError(
            f"{source.name} ({source.config.model_type}) has no attention layer that goes through the attention interface of "
            "transformers, so it has no KV cache to page: llmc compiles decoders with attention"
        )
    vocab_size = int(mod["main"].ret_ty.shape[-1])
    trained = int(getattr(source.config.get_text_config(), "max_position_embeddings", 0) or context)
    return ImportedModel(mod, walker.params, vocab_size, trained, binding.unused + _unread(walker, binding))


def _check_complete(source: ModelSource, binding: Binding, missing: list[str]) -> None:
    if not missing:
        return
    lines = "".join(f"\n  {name}" for name in missing)
    spare = "".join(f"\n  {name}" for name in binding.unused) or " none"
    raise ModelError(
        f"the checkpoint of {source.name} lacks {len(missing)} parameter{'s' if len(missing) > 1 else ''} that its config asks for "
        f"({source.path}):{lines}\ntensors of the checkpoint that nothing asks for:{spare}\n"
        "check that config and weights belong together"
    )


def _unread(walker: Walker, binding: Binding) -> list[str]:
    """Parameters of the checkpoint that the graph never touches."""
    read = {name.removesuffix(".T") for name in walker.params}
    return [name for name in binding.table if name not in read and name not in binding.tied]
