"""What a page of the KV cache holds: float values, or codes of fewer bits beside what turns them back. Thin: plain arithmetic.

A page of one layer and one KV head is a row of elements: the keys of its ``page_size`` slots, then their values. With a scheme of
:data:`SCHEMES` an element is a byte, and behind the codes come the parameters, bfloat16 in the machine's byte order::

    keys [page_size, key_bytes] · values [page_size, value_bytes] · pad · key parameters [page_size, ...] · value parameters · pad

Each key and each value of a slot is quantized by itself when it is appended, in groups of ``group`` elements (one group: the
head), x ≈ scale · code + minimum. So a page stays one plain tensor, a slot is written once, by one kernel, without a look at its
neighbours, and copying, sharing or forgetting a page takes its parameters along. Scales for a whole page would save 2 bytes a
slot (3 % of 64 int8 codes), and force every append to requantize the slots before it.

Parameters start at multiples of 16 bytes, as pages do, so that vector loads of codes stay aligned.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element that is stored as a float."""

_ALIGNMENT = 16
_PARAMETER_BYTES = 2


@dataclass(frozen=True)
class KvScheme:
    """``kind``: ``"int"`` or ``"fp8_e4m3"``; ``bits`` of a code; ``group``: elements that share parameters (0: the head);
    ``minimum``: whether a group has one, its codes then count up from it. ``largest``: the code's value that the group's largest
    absolute value is mapped to (with a minimum: its largest value)."""

    name: str
    kind: str
    bits: int
    largest: int
    group: int = 0
    minimum: bool = False

    def groups(self, dim: int) -> int:
        """Groups of a vector of ``dim`` elements; the last one may be shorter."""
        return -(-dim // self.group) if self.group else 1

    def span(self, dim: int) -> int:
        """Elements of a whole group."""
        return self.group or dim

    def code_bytes(self, dim: int) -> int:
        """Bytes of the codes of a vector; codes of 4 bits are in pairs, the lower half of a byte first."""
        return -(-dim * self.bits // 8)

    def parameters(self, dim: int) -> int:
        """Parameters of a vector: the scales of its groups, then their minima."""
        return self.groups(dim) * (2 if self.minimum else 1)


SCHEMES = {
    s.name: s
    for s in (
        KvScheme("int8", "int", 8, 127),
        KvScheme("fp8_e4m3", "fp8_e4m3", 8, 448),
        KvScheme("int4", "int", 4, 15, group=32, minimum=True),
    )
}
"""By the names that ``--kv-dtype`` takes beside those of floats."""

KV_DTYPES = (*FLOATS, *SCHEMES)


@dataclass(frozen=True)
class PageLayout:
    """Where things are in a page of one layer and one head; offsets and ``width`` in elements of ``dtype``. ``scheme``: None for
    floats, which have no parameters."""

    scheme: KvScheme | None
    dtype: str
    page_size: int
    k_dim: int
    v_dim: int

    @property
    def key_width(self) -> int:
        """Elements from one slot's key to the next one's."""
        return self.scheme.code_bytes(self.k_dim) if self.scheme else self.k_dim

    @property
    def value_width(self) -> int:
        return self.scheme.code_bytes(self.v_dim) if self.scheme else self.v_dim

    @property
    def values(self) -> int:
        """Where the values start; keys start at 0."""
        return self.page_size * self.key_width

    @property
    def key_parameters(self) -> int:
        """Where the parameters of the keys start: ``2 * scheme.parameters(k_dim)`` bytes a slot."""
        return _aligned(self.values + self.page_size * self.value_width)

    @property
    def value_parameters(self) -> int:
        """The same for the values."""
        assert self.scheme is not None
        return self.key_parameters + self.page_size * _PARAMETER_BYTES * self.scheme.parameters(self.k_dim)

    @property
    def width(self) -> int:
        """Elements of the page."""
        if self.scheme is None:
            return self.values + self.page_size * self.value_width
        return _aligned(self.value_parameters + self.page_size * _PARAMETER_BYTES * self.scheme.parameters(self.v_dim))

    @property
    def nbytes(self) -> int:
        return self.width * (FLOATS[self.dtype] if self.scheme is None else 1)


def page_layout(kv_dtype: str, page_size: int, k_dim: int, v_dim: int) -> PageLayout:
    """The layout for one of :data:`KV_DTYPES`. Raises KeyError for any other name."""
    scheme = SCHEMES.get(kv_dtype)
    return PageLayout(scheme, "uint8" if scheme else _float(kv_dtype), page_size, k_dim, v_dim)


def page_dtype(kv_dtype: str) -> str:
    """The dtype of the page tensors."""
    return "uint8" if kv_dtype in SCHEMES else _float(kv_dtype)


def scheme_attr(kv_dtype: str) -> dict[str, str]:
    """The attribute that an operator on pages has: the scheme's name, and none for floats, whose calls are the same as ever."""
    return {"kv_scheme": kv_dtype} if kv_dtype in SCHEMES else {}


def _float(name: str) -> str:
    if name not in FLOATS:
        raise KeyError(name)
    return name


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
