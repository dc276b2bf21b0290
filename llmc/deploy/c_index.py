"""What a C program must know of an artifact, as words and numbers that ``fscanf`` reads: ``model.txt``.

::

    library PATH                          of the module, relative to this file's folder, as all paths
    vocab V page P rows R context C       vocabulary; positions of a KV page; rows of one extend step; most positions
    stop COUNT ID...                      tokens that end a text
    device KIND tiles YES                 DLPack's number of the kind of device; 1 if the module uses AMX's tile registers
    kv LAYERS CODE BITS                   DLPack dtype of the KV pages
    HEADS WIDTH                           of each layer: the pages' shape is [pages, HEADS, WIDTH]
    weights COUNT
    CODE BITS NDIM DIM... OFFSET PATH     of each weight, in the order of the module's arguments
"""

from __future__ import annotations

from pathlib import Path

from llmc.manifest import Manifest, Variant
from llmc.runtime.tensors import dtype_code
from llmc.runtime.tile_registers import FEATURES
from llmc.runtime.weights import stored_weights

FILE_NAME = "model.txt"
DEVICES = {"cpu": 1, "cuda": 2, "metal": 8}
"""Kinds of targets that TVM's published libraries run -> DLPack's numbers."""


def c_index(m: Manifest, variant: Variant, folder: Path) -> str:
    """The text for ``variant`` of the artifact in ``folder``."""
    base = folder.name
    stops = [] if m.tokenizer is None else m.tokenizer.eos_token_ids
    code, bits = dtype_code(m.kv.page_dtype)
    lines = [
        f"library {base}/{variant.library}",
        f"vocab {m.model.vocab_size} page {m.kv.page_size} rows {m.limits.max_rows} context {m.model.context}",
        " ".join(map(str, ["stop", len(stops), *stops])),
        f"device {DEVICES[variant.kind]} tiles {int(not FEATURES.isdisjoint(variant.features))}",
        f"kv {len(m.kv.layers)} {code} {bits}",
        *(f"{layer.heads} {m.kv.layout(layer).width}" for layer in m.kv.layers),
        f"weights {len(variant.weights)}",
    ]
    for weight in stored_weights(folder, m.tensors, variant.weights):
        code, bits = dtype_code(weight.dtype)
        place = f"{base}/{weight.path.relative_to(folder).as_posix()}"
        lines.append(" ".join(map(str, [code, bits, weight.array.ndim, *weight.array.shape, weight.offset, place])))
    return "\n".join(lines) + "\n"
