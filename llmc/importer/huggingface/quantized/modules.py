"""A quantized checkpoint by layers: taking a layer's tensors together, and what replaces them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from llmc.errors import ModelError, UnsupportedError
from llmc.importer.file_tensor import FileTensor
from llmc.importer.finite import check_finite
from llmc.importer.params import Constant, Source
from llmc.passes.quantize.scheme import GROUPS, QuantizedTensor, floats, scheme

SUFFIXES = {"float16": "", "bfloat16": "_bf16", "float32": "_f32"}
"""Dtypes of scales -> how a scheme's name ends."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix [o, k], or a stack of them [E, o, k], that its file stores as codes and scales of the scheme ``quantization``.

    ``load`` gives the codes of all rows, [o, k] or [E · o, k]. ``column_order`` int64 [k]: the columns of the model that the stored
    columns are; None if they are in order. Values are float32.
    """

    origin: str
    shape: tuple[int, ...]
    quantization: str
    load: Callable[[], QuantizedTensor]
    column_order: np.ndarray | None = None

    @property
    def dtype(self) -> str:
        return "float32"

    @property
    def scheme(self) -> str:
        return self.quantization

    def quantized(self) -> QuantizedTensor:
        """The stored matrix, columns as they are stored. Raises ModelError if a scale is a NaN or an infinity."""
        found = self.load()
        check_finite(floats(found.scales, found.scheme.scale_dtype), Constant(found.scales, f"the scales of {self.origin}"))
        return found

    def read(self) -> np.ndarray:
        values = self.quantized().dequantize()
        if self.column_order is not None:
            stored, values = values, np.empty_like(values)
            values[:, self.column_order] = stored
        return values.reshape(self.shape)

    def describe(self) -> str:
        return self.origin


@dataclass
class Modules:
    """The tensors of a checkpoint that no layer has taken yet, and the weights made of those that were.

    A *module* is what precedes the last dot of a tensor's name: ``model.layers.0.self_attn.q_proj``.
    """

    tensors: dict[str, FileTensor]
    method: str
    made: dict[str, Source] = field(default_factory=dict)

    def having(self, part: str) -> Iterator[str]:
        """The modules that have a tensor ``part``."""
        end = f".{part}"
        yield from [name.removesuffix(end) for name in self.tensors if name.endswith(end)]

    def take(self, module: str, part: str) -> FileTensor:
        """The tensor ``part`` of ``module``, which leaves. Raises ModelError if there is none."""
        found = self.tensors.pop(f"{module}.{part}", None)
        if found is None:
            raise ModelError(
                f"the checkpoint holds a layer {module} quantized by {self.method} without its tensor {module}.{part}: "
                "download it again"
            )
        return found

    def take_if(self, module: str, part: str) -> FileTensor | None:
        """The tensor ``part`` of ``module``, if there is one."""
        return self.tensors.pop(f"{module}.{part}", None)

    def add(self, name: str, weight: Source) -> None:
        self.made[name] = weight

    def sources(self) -> dict[str, Source]:
        """Everything: what was made, and what is left as it is. Raises UnsupportedError for FP8 numbers without their scale."""
        for tensor in self.tensors.values():
            if tensor.dtype == "float8_e4m3fn":
                raise self.refusal(tensor.describe(), "to 8 bits without a scale beside it")
        return {**self.tensors, **self.made}

    def refusal(self, tensor: str, found: str) -> UnsupportedError:
        """The error for a tensor that is quantized in a way there is no importer for; ``found``: which, bits included."""
        return UnsupportedError(
            f"{tensor} is quantized by {self.method} {found}, which llmc cannot read: use the model's unquantized weights, a GGUF "
            "file of it, or another quantized checkpoint"
        )

    def expect(self, tensor: FileTensor, shape: tuple[int, ...], what: str) -> None:
        """Raise ModelError unless ``tensor`` has ``shape``, which ``what`` asks of it."""
        if tensor.shape != shape:
            raise ModelError(
                f"{tensor.describe()} is {list(tensor.shape)} and {what} asks for {list(shape)}: the tensors of this layer do not "
                "belong together, download the checkpoint again"
            )


def column_order(modules: Modules, index: FileTensor | None, bits: int, group: int) -> np.ndarray | None:
    """The columns in the order of the groups that ``index`` int32 [k] puts them in; None if they are in order, or if there is no
    index or one that was never set (-1). Raises UnsupportedError for groups that are not all of ``group`` columns.
    """
    of = None if index is None else index.read()
    if index is None or of is None or (of < 0).all():
        return None
    order = np.argsort(of, kind="stable")
    if not np.array_equal(of[order], np.arange(len(of)) // group):
        raise modules.refusal(index.describe(), f"to {bits} bits with groups that are not all of {group} columns")
    return None if np.array_equal(order, np.arange(len(of))) else order


def integer_scheme(modules: Modules, codes: FileTensor, bits: int, group: int, symmetric: bool, scales: FileTensor, k: int) -> str:
    """The name of the scheme scale · (code - zero) with ``group`` of ``k`` columns to a scale, a whole row if that is 0 or at least
    k. Raises UnsupportedError for groups and scales that no scheme has.
    """
    offset = "" if symmetric else "p"
    whole = not 0 < group < k
    if (not whole and group not in GROUPS) or scales.dtype not in SUFFIXES:
        raise modules.refusal(codes.describe(), f"to {bits} bits in groups of {group} columns with scales of {scales.dtype}")
    span = f"_g{group}" if not whole else "" if bits == 8 else "_row"
    return scheme(f"int{bits}{offset}{span}{SUFFIXES[scales.dtype]}").name


def scale_bits(scales: np.ndarray) -> np.ndarray:
    """Scales as a :class:`QuantizedTensor` holds them: bfloat16 as its bits."""
    return scales.view(np.uint16) if scales.dtype.kind == "V" or scales.dtype.name == "bfloat16" else scales
