"""The pages of a kernel call: how they are laid out and what they hold, for the kernel families of every target."""

from __future__ import annotations

from llmc.kv_layout import FLOATS, SCHEMES, PageLayout, page_layout
from llmc.schedules.protocol import KernelCall, TensorSpec


def pages_spec(kv_dtype: str, heads: int, page_size: int, d: int, dv: int) -> TensorSpec:
    """The page tensor of a layer."""
    layout = page_layout(kv_dtype, page_size, d, dv)
    return TensorSpec(("num_pages", heads, layout.width), layout.dtype)


def page_layout_of(call: KernelCall, pages: TensorSpec, d: int, dv: int) -> PageLayout:
    """The layout of the pages that ``call`` reads or writes."""
    return page_layout(call.attr("kv_scheme") or pages.dtype, int(call.attr("page_size")), d, dv)


def stored_as(call: KernelCall, pages: TensorSpec) -> str | None:
    """How the pages hold numbers, for the report: ``"float16"``, ``"int8"``; None for what is no storage of keys and values."""
    scheme = call.attr("kv_scheme")
    if scheme is not None:
        return str(scheme) if scheme in SCHEMES and pages.dtype == "uint8" else None
    return pages.dtype if pages.dtype in FLOATS else None


def slot_bytes(call: KernelCall, pages: TensorSpec, d: int, dv: int) -> int:
    """Bytes of a slot's key and value, rounded up where a page is padded."""
    return -(-page_layout_of(call, pages, d, dv).nbytes // int(call.attr("page_size")))
