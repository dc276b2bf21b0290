"""The FX walker: an exported torch graph in, a flat Relax function out.

torch's graph is ``[1, s, ...]``: a batch of one. The flat graph has no batch axis. One local rule removes it: **a tensor is kept
with its leading unit dimensions dropped** (:func:`stored_shape`). Broadcasting aligns dimensions at the right, so the rule never
changes what an elementwise op means, and converters only have to translate axis numbers (:meth:`Walker.axis`).

The rows of the flat graph are tokens of any mix of sequences, one at a time or many. So nothing but attention may look at two
tokens at once: a value for pairs of tokens, or an operation along the tokens, is refused (:meth:`Walker.rowwise`).

Nodes are visited on demand, backwards from the logits, so whatever the model computes beside (masks, packed-sequence
detection, caches) is never looked at. ``convert`` translates one node (:func:`llmc.importer.aten.convert`, a table from ATen op
to function). What it refuses is collected with its module path, and reported all at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
import tvm
from tvm import relax, tirx
from tvm.relax import TensorType

from llmc.importer.params import Constant, ParamTable, Source, transposed
from llmc.importer.report import Problem, Refused
from llmc.importer.values import DTYPE_NAMES, LENGTH, Size, Tensor, stored_shape

Convert = Callable[["Walker", torch.fx.Node, str, list[Any], dict[str, Any]], Any]
"""``convert(walker, node, op name, arguments, keyword arguments)``: the value of a node whose operands have values."""


class Walker:
    """Walks one exported program; see the module docstring.

    ``table`` provides the parameters, ``tied`` maps a name to the one that holds its data, ``buffers`` gives values that are in no
    checkpoint. Matrices keep ``storage_dtype``; everything else is in the compute dtype.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        table: ParamTable,
        tied: dict[str, str],
        buffers: dict[str, Any],
        storage_dtype: str,
        compute_dtype: str,
        convert: Convert,
    ) -> None:
        self.program = program
        self.convert = convert
        self.source_table = table
        self.tied = tied
        self.buffers = buffers
        self.storage_dtype = storage_dtype
        self.compute_dtype = compute_dtype
        self.params = ParamTable()
        self.vars: dict[str, relax.Var] = {}
        self.missing: list[str] = []
        self.problems: list[Problem] = []
        self.builder = relax.BlockBuilder()
        self.n = tirx.Var("n", "int64")
        self.input_ids = relax.Var("input_ids", TensorType((self.n,), "int32"))
        self.positions = relax.Var("positions", TensorType((self.n,), "int32"))
        self.attention_layers = 0
        self._lengths: set[sympy.Expr] = set()
        self._values: dict[torch.fx.Node, Any] = {}

    # --- shapes ---------------------------------------------------------------------------------------------------

    def size(self, size: Any) -> Size:
        """A torch size as an int or a sympy expression. Each input has a symbol for its length; all are one."""
        expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
        if expr.is_number:
            return int(expr)
        return expr.xreplace(dict.fromkeys(expr.free_symbols & self._lengths, LENGTH))

    def prim(self, size: Size) -> tirx.PrimExpr | int:
        """A size as a Relax shape entry: torch's sequence symbol becomes n."""
        if isinstance(size, int):
            return size
        if size == LENGTH:
            return self.n
        times = size / LENGTH
        if times.is_Integer:
            return self.n * int(times)
        raise Refused(f"the size {size}, which is not a multiple of the number of tokens")

    def rowwise(self, size: Size, what: str) -> None:
        """Raise Refused if ``size``, of a dimension that an operation mixes, is the number of tokens."""
        if not isinstance(size, int):
            raise Refused(f"{what} along the tokens, which are of several sequences")

    def prims(self, shape: Sequence[Size]) -> list[Any]:
        return [self.prim(s) for s in shape]

    def axis(self, tensor: Tensor, dim: int) -> int:
        """The stored axis of torch dimension ``dim``. Raises Refused for a dropped one."""
        dim = dim % tensor.ndim
        dropped = tensor.ndim - len(stored_shape(tensor.shape))
        if dim < dropped:
            raise Refused(f"an operation along the unit dimension {dim} of shape {list(tensor.shape)}")
        return dim - dropped

    # --- emitting -------------------------------------------------------------------------------------------------

    def emit(self, expr: relax.Expr) -> relax.Expr:
        return expr if isinstance(expr, relax.Var) else self.builder.emit(expr)

    def tensor(self, expr: relax.Expr, shape: Sequence[Size], dtype: str) -> Tensor:
        """Emit ``expr`` as a tensor of torch shape ``shape``. Unit dimensions it has too many or too few are settled here."""
        if sum(not isinstance(size, int) for size in shape) > 1:
            raise Refused("a value for every pair of tokens outside attention")
        var = self.emit(expr)
        stored = stored_shape(tuple(shape))
        if len(var.ty.shape) != len(stored):
            var = self.emit(relax.op.reshape(var, self.prims(stored)))
        return Tensor(var, tuple(shape), dtype)

    def like(self, node: torch.fx.Node, expr: relax.Expr) -> Tensor:
        """Emit ``expr`` as the value of ``node``: torch says its shape and dtype."""
        return self.tensor(expr, *self.meta(node))

    def meta(self, node: torch.fx.Node, index: int | None = None) -> tuple[tuple[Size, ...], str]:
        """Shape and dtype that torch recorded for a node, or for one of its results."""
        value = node.meta["val"] if index is None else node.meta["val"][index]
        return tuple(self.size(s) for s in value.shape), self.dtype_name(value.dtype)

    def sizes(self, node: torch.fx.Node) -> tuple[Size, ...]:
        """The torch shape of a node's value, whatever its dtype."""
        return tuple(self.size(s) for s in node.meta["val"].shape)

    def dtype_name(self, dtype: torch.dtype) -> str:
        if dtype not in DTYPE_NAMES:
            raise Refused(f"the dtype {dtype}")
        return DTYPE_NAMES[dtype]

    def cast(self, tensor: Tensor, dtype: str) -> Tensor:
        if tensor.dtype == dtype:
            return tensor
        return Tensor(self.emit(relax.op.astype(tensor.expr, dtype)), tensor.shape, dtype)

    def reshape(self, tensor: Tensor, shape: Sequence[Size]) -> Tensor:
        """``tensor`` in another torch shape; nothing is emitted where the stored shape stays the same."""
        shape = tuple(shape)
        if stored_shape(shape) == stored_shape(tensor.shape):
            return Tensor(tensor.expr, shape, tensor.dtype)
        return self.tensor(relax.op.reshape(tensor.expr, self.prims(stored_shape(shape))), shape, tensor.dtype)

    def restored(self, tensor: Tensor) -> relax.Expr:
        """The expression in its full torch shape, for the few ops that need a dropped dimension."""
        if len(stored_shape(tensor.shape)) == tensor.ndim:
            return tensor.expr
        return self.emit(relax.op.reshape(tensor.expr, self.prims(tensor.shape)))

    def constant(self, value: float | int | bool, dtype: str) -> relax.Expr:
        return relax.const(value, dtype)

    # --- parameters -----------------------------------------------------------------------------------------------

    def parameter(self, name: str, source: Source, dtype: str) -> relax.Var:
        """The graph parameter ``name``, made on first use."""
        if name not in self.vars:
            self.params.add(name, source, dtype)
            self.vars[name] = relax.Var(name, TensorType(list(source.shape), dtype))
        return self.vars[name]

    def _lift(self, name: str, node: torch.fx.Node) -> Any:
        """The value of a parameter or buffer placeholder."""
        name = self.tied.get(name, name)
        shape, dtype = self.meta(node)
        if name in self.source_table:
            source: Source = self.source_table[name].source
            matrix = len(source.shape) >= 2 and dtype == self.compute_dtype
            dtype = self.storage_dtype if matrix else dtype
        elif name in self.buffers and self.buffers[name].ndim == 0:
            return Tensor(self.constant(self.buffers[name].item(), dtype), shape, dtype)
        elif name in self.buffers:
            source = Constant(self.buffers[name], f"buffer {name}")
        elif name in self.program.constants:
            return self._constant(name, self.program.constants[name])
        else:
            self.missing.append(name)
            return self._stand_in(node.meta["val"])
        var = self.parameter(name, source, dtype)
        value = self.tensor(var, shape, dtype)
        return Tensor(value.expr, shape, dtype, var)

    def transposed_parameter(self, tensor: Tensor) -> Tensor | None:
        """For a matrix parameter ``[k, o]``: the parameter that is its transpose, made while streaming. None if it is none."""
        var = tensor.param
        if var is None or tensor.ndim != 2:
            return None
        name = f"{var.name}.T"
        source = transposed(self.params[var.name].source)
        return Tensor(self.parameter(name, source, tensor.dtype), (tensor.shape[1], tensor.shape[0]), tensor.dtype)

    # --- the walk -------------------------------------------------------------------------------------------------

    def run(self) -> tvm.IRModule:
        """The flat graph as an IRModule with one function ``main``. Problems are in ``problems`` and ``missing``."""
        signature = self.program.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        graph = self.program.graph
        inputs = list(signature.user_inputs)
        for node in graph.nodes:
            if node.op == "placeholder" and node.name in inputs:
                self._lengths.add(node.meta["val"].shape[1].node.expr)
        (output,) = [n for n in graph.nodes if n.op == "output"]
        (result,) = output.args[0]
        with self.builder.function("main", [self.input_ids, self.positions]):
            with self.builder.dataflow():
                shape = tuple(self.size(s) for s in result.meta["val"].shape[:2])
                for node in graph.nodes:
                    if node.op == "placeholder" and node.name in inputs:
                        var = self.input_ids if node.name == inputs[0] else self.positions
                        self._values[node] = Tensor(var, shape, "int32")
                    elif node.op == "placeholder":
                        self._values[node] = _Lazy(named[node.name].removeprefix("model."))
                logits = self.value(result)
                if not isinstance(logits, Tensor):
                    logits = Tensor(self.constant(0.0, "float32"), (), "float32")  # problems say why; the module is not used
                out = self.builder.emit_output(self.cast(logits, "float32").expr)
            self.builder.emit_func_output(out)
        return self._with_params(self.builder.get())

    def _with_params(self, mod: tvm.IRModule) -> tvm.IRModule:
        """Parameters are only known after the walk: put those that are used into the signature, in the table's order."""
        main = mod["main"]
        used = {var.name for var in relax.analysis.free_vars(main.body)}
        for name in [n for n in self.params if n not in used]:
            self.params.remove(name)
        params = [self.input_ids, self.positions, *(self.vars[name] for name in self.params)]
        main = relax.Function(params, main.body, main.ret_ty, is_pure=True)
        attrs = {"global_symbol": "main", "num_input": 2}
        return tvm.IRModule({"main": main.with_attrs(attrs)})

    def value(self, node: Any) -> Any:
        """The value of an argument: nodes are converted on first use, containers element by element, the rest is itself."""
        if isinstance(node, list | tuple):
            return type(node)(self.value(v) for v in node)
        if not isinstance(node, torch.fx.Node):
            return node
        self._convert_until(node)
        return self._values[node]

    def _convert_until(self, wanted: torch.fx.Node) -> None:
        """Convert ``wanted`` and all it needs, iteratively: a deep model's graph is deeper than Python's stack."""
        stack = [wanted]
        while stack:
            node = stack[-1]
            if node in self._values:
                held = self._values[node]
                if isinstance(held, _Lazy):
                    self._values[node] = self._guarded(node, partial(self._lift, held.name, node))
                stack.pop()
                continue
            waiting = (
                []
                if self._is_size(node)
                else [n for n in self._needs(node) if n not in self._values or isinstance(self._values[n], _Lazy)]
            )
            if waiting:
                stack.extend(reversed(waiting))
                continue
            self._values[node] = self._guarded(node, partial(self._convert, node))
            stack.pop()

    def _needs(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        return [n for n in node.all_input_nodes if n.op != "get_attr" or not _is_subgraph(n)]

    @staticmethod
    def _is_size(node: torch.fx.Node) -> bool:
        return isinstance(node.meta.get("val"), torch.SymInt | int | float | bool | torch.SymFloat | torch.SymBool)

    def _guarded(self, node: torch.fx.Node, convert: Callable[[], Any]) -> Any:
        """A node's value; if it is refused the problem is noted, and a stand-in lets the walk go on to find the others."""
        try:
            return convert()
        except Refused as refused:
            self.problems.append(Problem.of(node, str(refused)))
        except _Poisoned:
            pass
        return self._stand_in(node.meta.get("val"))

    def _stand_in(self, value: Any) -> Any:
        """Zeros of the type torch recorded, or None where there is no such type; a module with problems is never used."""
        if isinstance(value, list | tuple):
            return [self._stand_in(v) for v in value]
        try:
            shape, dtype = tuple(self.size(s) for s in value.shape), self.dtype_name(value.dtype)
            return self.tensor(relax.op.zeros(self.prims(stored_shape(shape)), dtype), shape, dtype)
        except (AttributeError, Refused):
            return None

    def _convert(self, node: torch.fx.Node) -> Any:
        if self._is_size(node):
            return self._number(node.meta["val"])
        if node.op == "get_attr":
            return self._attribute(node)
        if any(self._values.get(n, 0) is None for n in self._needs(node)):
            raise _Poisoned
        if str(node.target).startswith("wrap_with_"):
            return self._inline(node)
        if node.target is operator.getitem:
            return self.value(node.args[0])[node.args[1]]
        args = [self.value(a) for a in node.args]
        kwargs = {k: self.value(v) for k, v in node.kwargs.items()}
        return self.convert(self, node, _op_name(node.target), args, kwargs)

    def _number(self, value: Any) -> Any:
        if isinstance(value, int | float | bool):
            return value
        if isinstance(value, torch.SymInt):
            return self.size(value)
        raise Refused("a value that depends on the data of the batch")

    def _attribute(self, node: torch.fx.Node) -> Any:
        """A tensor the graph holds by itself: a constant made while tracing."""
        value: Any = self.program.graph_module
        if node.graph.owning_module is not None:
            value = node.graph.owning_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return self._constant(str(node.target), value)

    def _constant(self, name: str, value: Any) -> Tensor:
        """A tensor the model's code made while it was traced. On the meta device such a tensor has no values."""
        if not isinstance(value, torch.Tensor) or value.device.type == "meta":
            raise Refused("a constant whose value is not known")
        array = (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        name = f"constant.{name}"
        dtype = self.dtype_name(value.dtype)
        return self.tensor(self.parameter(name, Constant(array, name), dtype), tuple(array.shape), dtype)

    def _inline(self, node: torch.fx.Node) -> Any:
        """``wrap_with_set_grad_enabled(flag, subgraph, *operands)`` and its kin: the subgraph's ops are the caller's ops."""
        position = next(i for i, a in enumerate(node.args) if isinstance(a, torch.fx.Node) and _is_subgraph(a))
        handle = node.args[position]
        assert isinstance(handle, torch.fx.Node)
        module: Any = handle.graph.owning_module
        subgraph = getattr(module, str(handle.target)).graph
        operands = [self.value(a) for a in node.args[position + 1 :]]
        placeholders = [n for n in subgraph.nodes if n.op == "placeholder"]
        self._values.update(zip(placeholders, operands, strict=True))
        (output,) = [n for n in subgraph.nodes if n.op == "output"]
        return self.value(output.args[0])


@dataclass(frozen=True)
class _Lazy:
    """A parameter not asked for yet."""

    name: str


class _Poisoned(Exception):
    """An operand could not be converted."""


def _is_subgraph(node: torch.fx.Node) -> bool:
    module = node.graph.owning_module
    return node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), torch.fx.GraphModule)


def _op_name(target: Any) -> str:
    """``aten.add`` for every overload of it, ``llmc.attention`` for ours."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return getattr(target, "__name__", str(target))
