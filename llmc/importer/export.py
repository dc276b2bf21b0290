"""From a transformers config to an exported FX graph: the model on the meta device, ``torch.export`` with boundary ops.

No weight is allocated: parameters are moved to the meta device the moment they are registered, while buffers keep the values
their constructors compute (rope's ``inv_freq``, scales), because those are in no checkpoint.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch

from llmc.errors import UnsupportedError
from llmc.importer import boundary

# Two distinct lengths that are no likely size of anything else in a model, so that no dimension is mistaken for the sequence.
_EXAMPLE_LENGTH = 23


@dataclass
class Exported:
    """An exported model: ``program`` in inference form, and the values of its ``buffers`` by name."""

    program: torch.export.ExportedProgram
    buffers: dict[str, np.ndarray]


class _TokensToLogits(torch.nn.Module):
    """The one signature every decoder is exported by: ids [1, s], positions [1, s] -> logits [1, s, vocab]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        return self.model(input_ids=input_ids, use_cache=False, **positions).logits


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within the block, every parameter a module registers lands on the meta device; buffers stay real."""
    register_parameter = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = torch.nn.Parameter(param.to("meta"), requires_grad=False)
        register_parameter(module, name, param)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]


def build_model(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The causal language model of ``config``, parameters on the meta device, boundary ops in place, in eval mode.

    Raises UnsupportedError if transformers has no decoder-only class for the config.
    """
    from transformers import AutoModelForCausalLM

    boundary.register()
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=boundary.INTERFACE)
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        first = str(error).split("\n")[0]
        own = isinstance(error, KeyError) and boundary.INTERFACE in first
        why = "its attention does not go through the attention interface of transformers" if own else first
        raise UnsupportedError(
            f"model type {config.model_type!r} cannot be built as a decoder with paged attention: {why}"
        ) from error
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = boundary.INTERFACE
    boundary.describe_experts(model)
    return model.eval()


def _fix_dynamic_rope(model: torch.nn.Module, context: int) -> None:
    """Make length-dependent rope frequencies a constant of the compiled context.

    transformers picks them anew from the longest position of a batch, which would rotate cached keys and new queries by
    different angles as a sequence grows. A compiled model has one context limit: if it exceeds the length the frequencies were
    trained for, the long (or rescaled) set is used for every position, else the short one.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    module: Any
    for module in model.modules():
        forward = type(module).forward
        if not hasattr(module, "rope_type") or not hasattr(forward, "__wrapped__"):
            continue
        rope_types = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
        for layer_type, rope_type in rope_types.items():
            if rope_type != "longrope" and "dynamic" not in rope_type:
                continue
            parameters = module.config.rope_parameters
            parameters = parameters[layer_type] if layer_type else parameters
            original = parameters.get("original_max_position_embeddings") or module.config.max_position_embeddings
            prefix = f"{layer_type}_" if layer_type else ""
            if context > original:
                extra = {"layer_type": layer_type} if layer_type else {}
                inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](module.config, torch.device("cpu"), seq_len=context, **extra)
                setattr(module, f"{prefix}inv_freq", inv_freq)
                setattr(module, f"{prefix}attention_scaling", scaling)
            module.forward = inspect.unwrap(forward).__get__(module)  # the update depends on data and must not be traced


def _take_buffers(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Move every buffer to the meta device, and return the values by name."""
    values: dict[str, np.ndarray] = {}
    for prefix, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is None or buffer.device.type == "meta":
                continue
            full = f"{prefix}.{name}" if prefix else name
            tensor = buffer.detach()
            values[full] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
            module._buffers[name] = buffer.to("meta")
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and not isinstance(value, torch.nn.Parameter):
                delattr(module, name)
                module.register_buffer(name, value, persistent=False)
                full = f"{prefix}.{name}" if prefix else name
                values[full] = value.detach().float().numpy().copy() if value.is_floating_point() else value.numpy().copy()
                module._buffers[name] = value.to("meta")
    return values


def export_model(config: Any, model: torch.nn.Module, *, context: int) -> Exported:
    """Export ``model``, as :func:`build_model` made it of ``config``: one graph over s tokens, s symbolic in [2, context].

    Raises UnsupportedError if the model cannot be traced, with torch's reason.
    """
    _fix_dynamic_rope(model, context)
    buffers = _take_buffers(model)
    wrapped = _TokensToLogits(model)
    length = torch.export.Dim("s", min=2, max=max(context, 2 * _EXAMPLE_LENGTH))
    ids = torch.zeros((1, _EXAMPLE_LENGTH), dtype=torch.long, device="meta")
    positions = torch.zeros((1, _EXAMPLE_LENGTH), dtype=torch.long, device="meta")
    shapes = {"input_ids": {1: length}, "position_ids": {1: length}}
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(
                wrapped, (ids, positions), dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
            )
    except Exception as error:  # torch.export raises whatever the model's own code raises
        raise UnsupportedError(_explain(config, error)) from error
    _check_lengths(config, program, context)
    return Exported(_functional(program), buffers)


def _check_lengths(config: Any, program: torch.export.ExportedProgram, context: int) -> None:
    """Raise UnsupportedError if the trace holds only for some sequence lengths: the model branches on its length.

    torch notes what it assumed about sizes as assertions. Most are true for every length and merely beyond its prover (that a
    reshape fits); each is tried at many lengths.
    """
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    environment = inputs[0].meta["val"].shape[1].node.shape_env
    lengths = sorted({*range(2, 66), *(2**i + d for i in range(6, 21) for d in (-1, 0, 1)), context})
    for assumed in [a.expr for group in environment.deferred_runtime_asserts.values() for a in group]:
        for length in (n for n in lengths if n <= context):
            if assumed.xreplace(dict.fromkeys(assumed.free_symbols, sympy.Integer(length))) != sympy.true:
                raise UnsupportedError(
                    f"model type {config.model_type!r} computes differently at different lengths: what was traced holds where "
                    f"{assumed}, and not for a sequence of {length}"
                )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of its own deprecations and of attributes set while tracing; neither is the user's to act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without in-place ops. Retracing doubles the export's time, so it is done only where a model mutates."""

    def mutates(graph: torch.fx.Graph) -> bool:
        for node in graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if node.op == "call_function" and schema is not None and schema.is_mutable:
                return True
        return False

    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    if any(mutates(g) for g in graphs):
        with _quiet():
            return program.run_decompositions({})
    return program


def _explain(config: Any, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if reason.startswith("Constraints violated"):
        reason = "its code takes the number of tokens for a constant, as recurrent layers and masks of their own making do"
    where = ""
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if "modeling_" in path:
            where = f" at {path.rsplit('/', 1)[-1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"model type {config.model_type!r} cannot be traced into one graph{where}: {reason}"
