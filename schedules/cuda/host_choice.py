"""Several kernels in one PrimFunc: one of them by the sizes it is called with, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from tvm import tirx
from tvm_ffi.structural import structural_map

Expr = Any


def host_choice(functions: Sequence[Any], conditions: Sequence[Expr]) -> Any:
    """One function with the parameters, name and attributes of the first: function i if condition i is the first to hold, else the
    last. Conditions, one less than functions, are over the symbols in the shapes of the first function's parameters.
    """
    first = functions[0]
    bodies = [first.body, *(_renamed(f, first) for f in functions[1:])]
    choices = zip(reversed(bodies[:-1]), reversed(conditions), strict=True)
    body = reduce(lambda rest, choice: tirx.IfThenElse(choice[1], choice[0], rest), choices, bodies[-1])
    return tirx.PrimFunc(first.params, body, first.ret_type, first.attrs)


def for_rows(
    name: str, buckets: Mapping[str, int | None], config: Mapping[str, Any], kernel: Callable[[dict[str, Any]], Any]
) -> Any:
    """The function that picks a kernel by its first operand's number of rows: ``kernel(config[axis])`` for up to ``buckets[axis]``.

    Each configuration also gets ``dependent_launch`` of ``config``. Neighbouring ranges with one configuration share a kernel.
    """
    chosen: list[tuple[dict[str, Any], int | None]] = []
    for axis, most in buckets.items():
        value = {**config[axis], "dependent_launch": config["dependent_launch"]}
        if chosen and chosen[-1][0] == value:
            chosen.pop()
        chosen.append((value, most))
    functions = [kernel(value) for value, _ in chosen]
    n = functions[0].params[0].ty.shape[0]
    return host_choice(functions, [n <= most for _, most in chosen[:-1]]).with_attr("global_symbol", name)


Tensor = tuple[tuple[Expr, ...], str]
"""Shape and dtype."""


def in_sequence(
    name: str, operands: Mapping[str, Tensor], workspaces: Mapping[str, Tensor], steps: Sequence[tuple[Any, Sequence[str]]]
) -> Any:
    """One function with parameters ``operands`` that launches each of ``steps``, functions and the names of their arguments.

    ``workspaces`` are buffers that live as long as the call. A shape of the arguments may differ from that of the function's
    parameters if the elements in memory are the same; the function's attributes are those of the first step.
    """
    buffers = {key: tirx.decl_buffer(*tensor, name=key) for key, tensor in {**operands, **workspaces}.items()}
    bodies = [_substituted(function, [buffers[key] for key in keys]) for function, keys in steps]
    body = tirx.SeqStmt([*(tirx.AllocBuffer(buffers[key]) for key in workspaces), *bodies])
    first = steps[0][0]
    whole = tirx.PrimFunc([buffers[key] for key in operands], body, first.ret_type, first.attrs)
    return whole.with_attr("global_symbol", name)


def _renamed(function: Any, like: Any) -> Any:
    """The body of ``function`` over the parameters, and the symbols in their shapes, of ``like``."""
    return _substituted(function, like.params)


def _substituted(function: Any, arguments: Sequence[Any]) -> Any:
    """The body of ``function`` over ``arguments``, and the symbols in the parameters' shapes over their shapes."""
    new: list[tuple[Any, Any]] = []
    for mine, theirs in zip(function.params, arguments, strict=True):
        new.append((mine, theirs))
        if len(mine.ty.shape) == len(theirs.ty.shape):
            new += [(a, b) for a, b in zip(mine.ty.shape, theirs.ty.shape, strict=True) if isinstance(a, tirx.Var)]

    def replace(var: Any) -> Any:
        return next((b for a, b in new if a.same_as(var)), var)

    return structural_map(function.body, [(tirx.Var, replace)], order="pre")
