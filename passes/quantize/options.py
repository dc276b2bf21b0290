"""What the user asks of quantization, checked: ``--quant``, ``--keep``, ``--method`` and ``--target-bpw``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llmc.errors import UsageError
from llmc.passes.quantize.scheme import scheme

NATIVE = "native"
"""As the checkpoint stores it: codes are kept, everything else stays a float."""
NONE = "none"
FINEST = "int8_g64"
"""What a budget starts from."""
INT8_ROW = "int8_row"
ROUND_TO_NEAREST = "rtn"
SMOOTHQUANT = "smoothquant"
METHODS = (ROUND_TO_NEAREST, "awq", "gptq", SMOOTHQUANT)


@dataclass(frozen=True)
class QuantOptions:
    """How matrices are stored. Raises UsageError for a scheme, a method or a regular expression that means nothing.

    ``quant``: the scheme of all, ``"none"``, or None for the default. ``keep``: exceptions ``"NAME=SCHEME"``, where NAME is a
    regular expression found in a matrix's name and SCHEME may be ``none``; the first that fits counts. ``native``: without
    ``quant``, matrices that the checkpoint stores quantized stay as they are. ``activations``: see :mod:`llmc.dialect.quantized`;
    empty for ``"int8"`` on a CPU and ``"compute"`` on a GPU. ``method``: how codes are found, one of :data:`METHODS`; all but the
    first look at calibration text. ``target_bpw``: bits per weight of the whole model, in the place of ``quant``; which matrix gets
    which scheme is then measured on that text.
    """

    quant: str | None = None
    keep: tuple[str, ...] = ()
    native: bool = False
    activations: str = ""
    method: str = ROUND_TO_NEAREST
    target_bpw: float | None = None

    def __post_init__(self) -> None:
        _ = self.default, self.exceptions
        if self.method not in METHODS:
            raise UsageError(f"unknown quantization method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.target_bpw is not None and self.quant is not None:
            raise UsageError(f"--quant {self.quant} and --target-bpw {self.target_bpw:g} both say how to store matrices: give one")
        if self.target_bpw is not None and not 1 < self.target_bpw < 16:
            raise UsageError(f"--target-bpw {self.target_bpw:g} cannot be: bits per weight go from 2 to 9 here")
        rounds = self.default not in (NATIVE, NONE) or any(name not in (NATIVE, NONE) for _, name in self.exceptions)
        if self.method != ROUND_TO_NEAREST and not rounds:
            raise UsageError(f"--method {self.method} has nothing to round: say to what, such as --quant int4_g64")

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is needed."""
        return self.method != ROUND_TO_NEAREST or self.target_bpw is not None

    @property
    def default(self) -> str:
        """The full name of a scheme, ``"native"`` or ``"none"``."""
        if self.target_bpw is not None:
            return FINEST
        if self.quant is None:
            return NATIVE if self.native else NONE
        return NONE if self.quant == NONE else _rounding(self.quant)

    @property
    def exceptions(self) -> list[tuple[str, str]]:
        """``keep`` as pairs of a regular expression and what :attr:`default` may be."""
        pairs = []
        for text in self.keep:
            pattern, equals, name = text.rpartition("=")
            if not equals or not pattern:
                raise UsageError(f"--keep takes NAME=SCHEME, such as lm_head=int8 or 'layers\\.0\\.=none', and {text!r} was given")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"--keep {text!r}: {pattern!r} is no regular expression ({error})") from error
            pairs.append((pattern, name if name in (NONE, NATIVE) else _rounding(name)))
        return pairs

    def described(self) -> dict[str, Any]:
        """For the manifest: what was asked, in full names."""
        kept = {"keep": [f"{pattern}={name}" for pattern, name in self.exceptions]} if self.keep else {}
        quant = {"quant": self.default} if self.target_bpw is None else {"target_bpw": self.target_bpw}
        return {**quant, **kept, **({"method": self.method} if self.calibrated else {})}


def _rounding(name: str) -> str:
    """The full name of a scheme that weights can be rounded to. ``int8_row`` keeps its name: a target may store ``int8`` finer."""
    found = scheme(name)
    if found.super_group:
        raise UsageError(
            f"weights cannot be rounded to {found.name}, a format that GGUF files come in: use int4z_g32, int6_g16 or the like"
        )
    return name if name == INT8_ROW else found.name
