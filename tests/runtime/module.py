"""A module with the ABI of :mod:`llmc.manifest`, made by hand: small enough to say what each argument must be.

Row i writes ``input_ids[i] + 0.5 * positions[i]`` to its slot of every layer's pages. Its logits are row ``input_ids[i]`` of the
first weight (float32 [vocab, vocab]), plus ``second[j]`` (bfloat16 [vocab]), plus the sum of layer 1's cache up to and with itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np

from llmc.manifest import FileInfo, FunctionInfo, KvInfo, KvLayer, Limits, Manifest, ModelInfo, TensorInfo, TokenizerFiles, Variant
from llmc.runtime.host import host
from llmc.version import __version__

from .files import write_safetensors

VOCAB, PAGE_SIZE, CONTEXT = 11, 4, 32
LIMITS = Limits(max_batch=3, max_rows=8, max_logit_rows=5)


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    return {
        "first": rng.normal(size=(VOCAB, VOCAB)).astype(np.float32),
        "second": rng.normal(size=VOCAB).astype(ml_dtypes.bfloat16),
    }


def reference(tokens: list[int]) -> np.ndarray:
    """Logits [n, vocab] of a sequence in float64."""
    w = weights()
    values = np.array(tokens) + 0.5 * np.arange(len(tokens))
    return w["first"].astype(np.float64)[tokens] + w["second"].astype(np.float64) + np.cumsum(values)[:, None]


def build_library(path: Path) -> None:
    """Compile the module to ``path`` for this machine."""
    from tvm import relax, tirx
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def append(ids: T.handle, positions: T.handle, slots: T.handle, pages0: T.handle, pages1: T.handle):
        n, p = T.int64(), T.int64()
        IDS = T.match_buffer(ids, (n,), "int32")
        POS = T.match_buffer(positions, (n,), "int32")
        SLOT = T.match_buffer(slots, (n,), "int32")
        P0 = T.match_buffer(pages0, (p, 1, PAGE_SIZE * 2), "float32")
        P1 = T.match_buffer(pages1, (p, 1, PAGE_SIZE * 2), "float32")
        for i in range(n):
            P0[SLOT[i] // PAGE_SIZE, 0, SLOT[i] % PAGE_SIZE] = T.Cast("float32", IDS[i]) + 0.5 * T.Cast("float32", POS[i])
            P1[SLOT[i] // PAGE_SIZE, 0, SLOT[i] % PAGE_SIZE] = T.Cast("float32", IDS[i]) + 0.5 * T.Cast("float32", POS[i])

    @T.prim_func(s_tir=True)
    def attend(
        ids: T.handle, indptr: T.handle, lens: T.handle, table: T.handle, wanted: T.handle,
        pages: T.handle, first: T.handle, second: T.handle, out: T.handle,
    ):  # fmt: skip
        n, b, m, p, w, r = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        IDS = T.match_buffer(ids, (n,), "int32")
        PTR = T.match_buffer(indptr, (b + T.int64(1),), "int32")
        LEN = T.match_buffer(lens, (b,), "int32")
        TABLE = T.match_buffer(table, (b, m), "int32")
        ROWS = T.match_buffer(wanted, (w,), "int32")
        P = T.match_buffer(pages, (p, 1, PAGE_SIZE * 2), "float32")
        FIRST = T.match_buffer(first, (VOCAB, VOCAB), "float32")
        SECOND = T.match_buffer(second, (VOCAB,), "bfloat16")
        OUT = T.match_buffer(out, (r, VOCAB), "float32")
        for i, s, j in T.grid(r, b, VOCAB):
            if ROWS[i] >= PTR[s] and ROWS[i] < PTR[s + 1]:
                OUT[i, j] = FIRST[IDS[ROWS[i]], j] + T.Cast("float32", SECOND[j])
                for q in range(LEN[s] - (PTR[s + 1] - ROWS[i]) + 1):
                    OUT[i, j] = OUT[i, j] + P[TABLE[s, q // PAGE_SIZE], 0, q % PAGE_SIZE]

    bb = relax.BlockBuilder()
    append_gv, attend_gv = bb.add_func(append, "append"), bb.add_func(attend, "attend")
    for phase in ("decode", "extend"):
        b, m, p = (tirx.Var(name, "int64") for name in "bmp")
        n = b if phase == "decode" else tirx.Var("n", "int64")
        r = b if phase == "decode" else tirx.Var("r", "int64")
        types = {
            "out": ([r, VOCAB], "float32"), "ids": ([n], "int32"), "positions": ([n], "int32"), "slots": ([n], "int32"),
            "indptr": ([b + 1], "int32"), "lens": ([b], "int32"), "table": ([b, m], "int32"), "wanted": ([r], "int32"),
            "pages0": ([p, 1, PAGE_SIZE * 2], "float32"), "pages1": ([p, 1, PAGE_SIZE * 2], "float32"),
            "first": ([VOCAB, VOCAB], "float32"), "second": ([VOCAB], "bfloat16"),
        }  # fmt: skip
        if phase == "decode":
            del types["wanted"]
        v = {name: relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in types.items()}
        with bb.function(phase, list(v.values())):
            pages = [v["pages0"].ty, v["pages1"].ty]
            args = [v["ids"], v["positions"], v["slots"], v["pages0"], v["pages1"]]
            kept = bb.emit(relax.call_tir_inplace(append_gv, args, [3, 4], out_ty=pages))
            cache = bb.emit(relax.TupleGetItem(kept, 1))
            args = [v["ids"], v["indptr"], v["lens"], v["table"], v.get("wanted", v["indptr"])]
            args += [cache, v["first"], v["second"], v["out"]]
            done = bb.emit(relax.call_tir_inplace(attend_gv, args, [8], out_ty=[v["out"].ty]))
            bb.emit_func_output(done)
    relax.build(bb.get(), target="llvm").export_library(str(path))


def write_artifact(folder: Path, library: Path, tokenizer: TokenizerFiles | None = None) -> Manifest:
    """An artifact of the module in ``folder`` (which may hold tokenizer files already); its manifest, as written."""
    system = {"linux": "unknown-linux-gnu", "darwin": "apple-darwin"}[host().system]
    variant = Variant(
        name="cpu", target="cpu:here", kind="cpu", triple=f"{host().machine}-{system}", mcpu="here", features=[],
        library="variants/cpu/lib.so", functions=[FunctionInfo(f, 0, 2) for f in ("decode", "extend")],
        weights=["first", "second"], kernels=[],
    )  # fmt: skip
    (folder / "variants" / "cpu").mkdir(parents=True, exist_ok=True)
    (folder / "weights").mkdir(exist_ok=True)
    (folder / variant.library).write_bytes(library.read_bytes())
    stored = "weights/weights-00001.safetensors"
    write_safetensors(folder / stored, weights())
    m = Manifest(
        llmc=__version__,
        tvm="0.27.0.post1",
        model=ModelInfo("hand-made", "hand/made", "0", "toy", 0, VOCAB, CONTEXT, CONTEXT),
        kv=KvInfo(PAGE_SIZE, "float32", [KvLayer(1, 1, 1), KvLayer(1, 1, 1)]),
        limits=LIMITS,
        graph_sha256="",
        options={},
        variants=[variant],
        tensors={k: TensorInfo(stored, a.dtype.name, list(a.shape), a.dtype.name, a.dtype.name) for k, a in weights().items()},
        tokenizer=tokenizer,
    )
    for name in sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"):
        data = (folder / name).read_bytes()
        m.files[name] = FileInfo(len(data), hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").write_text(m.to_json(), encoding="utf-8")
    return m
