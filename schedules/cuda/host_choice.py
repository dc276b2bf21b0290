"""Several kernels for the same arguments in one PrimFunc, of which host code launches one by the sizes it is called with."""

from __future__ import annotations

from collections.abc import Sequence
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


def _renamed(function: Any, like: Any) -> Any:
    """The body of ``function`` over the parameters, and the symbols in their shapes, of ``like``."""
    new: list[tuple[Any, Any]] = []
    for mine, theirs in zip(function.params, like.params, strict=True):
        shapes = zip(mine.ty.shape, theirs.ty.shape, strict=True)
        new += [(mine, theirs), *((a, b) for a, b in shapes if isinstance(a, tirx.Var))]

    def replace(var: Any) -> Any:
        return next((b for a, b in new if a.same_as(var)), var)

    return structural_map(function.body, [(tirx.Var, replace)], order="pre")
