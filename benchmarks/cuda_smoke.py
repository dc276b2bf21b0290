"""Does a compiled model run on a GPU, is it right, and how fast does it decode?

On a machine with the compiler (no GPU needed), then on the one with the GPU (no compiler needed: numpy, torch, tvm_ffi)::

    python benchmarks/cuda_smoke.py prepare FOLDER [--target cuda:sm_90a]
    PYTHONPATH=. python benchmarks/cuda_smoke.py run FOLDER

``prepare`` compiles three decoders of random weights: two tiny ones, and one of 1.2 billion parameters, of whose weights it keeps
the file's header only, so that the folder stays small. ``run`` fills that file with random numbers, compares the logits of
prefill, decode and a ragged mix with torch in float32, times decode and prefill, and prints one table last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

SMALL = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "odd": {**SMALL, "vocab_size": 277, "hidden_size": 60, "intermediate_size": 92, "num_attention_heads": 6,
            "num_key_value_heads": 3, "head_dim": 10, "tie_word_embeddings": False},
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": True},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
           "tie_word_embeddings": False},
}  # fmt: skip
KEPT_HEADER = ("1b", "8b")
EPS, THETA = 1e-5, 10000.0
TOLERANCE = {"bfloat16": 3e-2, "float16": 6e-3, "float32": 1e-4}
"""Largest difference of a logit, in units of the largest logit."""


def prepare(folder: Path, target: str, dtype: str, names: list[str]) -> None:
    """Compile the models into ``folder``."""
    from llmc.compiler import compile as compile_model

    for name in names:
        source, out = folder / f"{name}.model", folder / name
        write_model(source, MODELS[name], zeros=name in KEPT_HEADER)
        start = time.perf_counter()
        with headers_only() if name in KEPT_HEADER else nullcontext():
            compile_model(str(source), out=out, target=target, dtype=dtype, max_batch=16, page_size=16, force=True)
        shutil.rmtree(source)
        print(f"{name}: compiled for {target} in {time.perf_counter() - start:.1f} s")


@contextmanager
def headers_only() -> Iterator[None]:
    """Within it, a compile writes ``.header`` files, each the start of a weights file, and no weights: see :func:`fill_weights`."""
    from llmc import weights_file
    from llmc.manifest import FileInfo

    def write(path: Path, params: list[Any], _: Any) -> FileInfo:
        head = weights_file._header(params)
        path.with_suffix(".header").write_bytes(head)
        entries = json.loads(head[8:]).values()
        return FileInfo(len(head) + max(entry["data_offsets"][1] for entry in entries), "")

    real = weights_file._write_file
    weights_file._write_file = write
    try:
        yield
    finally:
        weights_file._write_file = real


def write_model(folder: Path, config: dict[str, Any], zeros: bool) -> None:
    """A checkpoint: config.json and float16 weights, random or all zero (then a hole in the file: it takes no space)."""
    folder.mkdir(parents=True, exist_ok=True)
    fixed = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps({**config, **fixed, "dtype": "float16"}))
    h, i, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], h), "model.norm.weight": (h,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], h)
    for layer in range(config["num_hidden_layers"]):
        parts = {"self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
                 "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i), "input_layernorm": (h,),
                 "post_attention_layernorm": (h,)}  # fmt: skip
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + 2 * int(np.prod(shape))]}
        offset = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if zeros:
            file.truncate(file.tell() + offset)
            return
        for shape in shapes.values():
            values = rng.standard_normal(shape) * 0.1 + (len(shape) == 1)
            file.write(values.astype(np.float16).tobytes())


def fill_weights(folder: Path) -> None:
    """Random weights behind every kept header: norms about one, matrices small, codes of quantized matrices anything."""

    tensors = json.loads((folder / "manifest.json").read_text())["tensors"]
    drawn: dict[tuple[str, str, bool], bytes] = {}
    for path in (folder / "weights").glob("*.header"):
        head = path.read_bytes()
        weights = path.with_suffix(".safetensors")
        if weights.exists():
            continue
        with weights.open("wb") as file:
            file.write(head)
            for name, entry in json.loads(head[8:]).items():
                left = entry["data_offsets"][1] - entry["data_offsets"][0]
                if name.startswith("__pad"):
                    file.write(bytes(left))
                    continue
                if name.startswith("llmc.ones."):  # what is left of a norm's weight
                    file.write(np.ones(left // 4, np.float32).tobytes())
                    continue
                scheme, vector = tensors[name]["scheme"], len(entry["shape"]) == 1
                if entry["dtype"] == "F32" and scheme == "float32":  # rope's frequencies, the one tensor that is not free to choose
                    count = left // 4
                    file.write((THETA ** (-np.arange(count) / count)).astype(np.float32).tobytes())
                    continue
                key = (entry["dtype"], scheme, vector)
                if key not in drawn:
                    drawn[key] = _random(entry["dtype"], scheme, vector)
                while left > 0:  # drawing gigabytes anew would take most of a minute
                    file.write(memoryview(drawn[key])[:left])
                    left -= len(drawn[key])


def _random(tag: str, scheme: str, vector: bool) -> bytes:
    """Random values of the safetensors type ``tag`` for a matrix stored by ``scheme``, more than an L2 cache holds."""
    import torch

    torch.manual_seed(0)
    count = 48_000_007
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(tag)
    if dtype is None:
        codes = torch.randint(0, 256, (count,), device="cuda", dtype=torch.uint8)
        values = codes & 0xF7 if scheme.startswith("fp8") else codes  # e4m3 without its NaN
    elif scheme not in ("float32", "bfloat16", "float16"):  # the scales of a quantized matrix, whose values come to about 0.02
        largest = {"fp8": 448.0, "int8": 127.0}.get(scheme.split("_")[0], 8.0)
        values = (0.02 * 1.7 / largest * (0.8 + 0.4 * torch.rand(count, device="cuda"))).to(dtype)
    else:
        normal = torch.randn(count, device="cuda")
        values = (1 + 0.1 * normal if vector else 0.02 * normal).to(dtype)
    return values.cpu().view(torch.uint8).numpy().tobytes()


class TorchDecoder:
    """The same model in torch on the GPU, from the weights of the artifact: as a rule in float32, as the reference; in a 16-bit
    ``dtype`` it shows what rounding costs. Norms are float32 either way. Quantized matrices need the compiler's packages."""

    def __init__(self, folder: Path, manifest: Any, config: dict[str, Any], dtype: str = "float32") -> None:
        import torch

        from llmc.runtime.weights import map_weights

        self.torch, self.config, self.dtype = torch, config, getattr(torch, dtype)
        names = manifest.variants[0].weights
        stored = dict(zip(names, map_weights(folder, manifest.tensors, names), strict=True))
        self.weights: dict[str, Any] = {}
        quantized: dict[str, dict[str, tuple[np.ndarray, str]]] = {}
        for name, (array, kind) in stored.items():
            matrix, _, part = name.rpartition(".")
            if f"{matrix}.codes" in stored:
                quantized.setdefault(matrix, {})[part] = array, kind
            else:
                values = torch.from_numpy(array.view(np.int16) if kind == "bfloat16" else array)
                self.weights[name] = (values.view(torch.bfloat16) if kind == "bfloat16" else values).cuda().to(self.dtype)
        if quantized:
            from llmc.schedules.gpu import layout_mma  # noqa: F401  (here, and not in every thread at once)

        def dequantized(matrix: str) -> Any:
            values = self._dequantized(matrix, quantized[matrix], manifest.tensors[f"{matrix}.codes"].scheme)
            return torch.from_numpy(values).cuda().to(self.dtype)

        with ThreadPoolExecutor() as threads:
            self.weights |= zip(quantized, threads.map(dequantized, quantized), strict=True)

    def rounded(self, dtype: str) -> TorchDecoder:
        """This decoder with its weights rounded to another dtype, in which it then computes."""
        other = copy(self)
        other.dtype = getattr(self.torch, dtype)
        other.weights = {name: values.to(other.dtype) for name, values in self.weights.items()}
        return other

    def _dequantized(self, name: str, parts: dict[str, tuple[np.ndarray, str]], scheme_name: str) -> np.ndarray:
        import ml_dtypes

        from llmc.passes.quantize.scheme import scheme
        from llmc.schedules.gpu import layout_mma

        c = self.config
        h, i, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
        q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
        shapes = {"q_proj": (q + 2 * kv, h), "o_proj": (h, q), "gate_proj": (2 * i, h), "down_proj": (h, i)}
        o, k = next((s for word, s in shapes.items() if word in name), (c["vocab_size"], h))
        arrays = {n: a.view(ml_dtypes.bfloat16) if kind == "bfloat16" else a for n, (a, kind) in parts.items()}
        return layout_mma.unpack(arrays, scheme(scheme_name), o, k).dequantize()

    def _weight(self, *words: str) -> Any:
        (name,) = [n for n in self.weights if all(word in n for word in words)]
        return self.weights[name]

    def _norm(self, x: Any, *words: str) -> Any:
        """The norm whose weight's name has ``words``; it has none if the compiler put it into the layers behind the norm."""
        wide = x.float()
        normal = (wide * self.torch.rsqrt((wide * wide).mean(-1, keepdim=True) + EPS)).to(self.dtype)
        weight = [w for name, w in self.weights.items() if all(word in name for word in words)]
        return normal * weight[0] if weight else normal

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [len(ids), vocab]."""
        torch, c = self.torch, self.config
        f, d, n = torch.nn.functional, c["head_dim"], len(ids)
        heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
        embed = self._weight("embed_tokens")
        x = embed[torch.tensor(ids, device="cuda")]
        angle = torch.arange(n, device="cuda")[:, None] * THETA ** (-torch.arange(0, d, 2, device="cuda").double() / d)[None]
        cos, sin = (torch.cat([t, t], -1).to(self.dtype)[:, None] for t in (angle.cos(), angle.sin()))

        def turn(t: Any) -> Any:
            return t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * sin

        for layer in range(c["num_hidden_layers"]):
            of = f"layers.{layer}."
            y = self._norm(x, of, "input_layernorm") @ self._weight(of, "q_proj+k_proj+v_proj").T
            q, k, v = (t.view(n, -1, d) for t in y.split([heads * d, groups * d, groups * d], -1))
            q, k, v = (t.transpose(0, 1)[None] for t in (turn(q), turn(k), v))
            k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
            a = f.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).reshape(n, heads * d)
            x = x + a @ self._weight(of, "o_proj").T
            gate, up = (self._norm(x, of, "post_attention") @ self._weight(of, "gate_proj+up_proj").T).chunk(2, -1)
            x = x + (f.silu(gate) * up) @ self._weight(of, "down_proj").T
        head = embed if c["tie_word_embeddings"] else self._weight("lm_head")
        found: np.ndarray = (self._norm(x, "model.norm") @ head.T).float().cpu().numpy()
        return found


class Runner:
    """An artifact on the GPU: sequences of tokens through its executor."""

    def __init__(self, folder: Path, graphs: bool, num_pages: int) -> None:
        from llmc.runtime.artifact import open_artifact
        from llmc.runtime.gpu.cuda import CudaExecutor
        from llmc.runtime.pages import PageAllocator

        artifact = open_artifact(folder)
        self.manifest = artifact.manifest
        start = time.perf_counter()
        self.executor = CudaExecutor(artifact, num_pages, graphs=graphs)
        self.load_seconds = time.perf_counter() - start
        self.allocator = PageAllocator(num_pages, self.manifest.kv.page_size)

    def sequence(self, tokens: list[int]) -> Any:
        from llmc.runtime.sequence import Sequence

        return Sequence(tokens, self.allocator)

    def step(self, *plan: tuple[Any, int, int]) -> np.ndarray:
        """Run (sequence, rows, logits) together; the logits, in order."""
        from llmc.runtime.batch import Chunk, build_step

        chunks = [Chunk(*item) for item in plan]
        for chunk in chunks:
            chunk.sequence.table.reserve(chunk.rows, self.executor.copy_page)
        found = self.executor.run(build_step(chunks)).copy()
        for chunk in chunks:
            chunk.sequence.table.advance(chunk.rows)
        return found


def _check(name: str, folder: Path, graphs: bool) -> tuple[float, float]:
    """Largest errors of prefill and of decode (a ragged batch of three, four steps), relative to the largest logit."""
    runner = Runner(folder, graphs, 64)
    torch_model = TorchDecoder(folder, runner.manifest, MODELS[name])
    rng = np.random.default_rng(1)
    texts = [[int(t) for t in rng.integers(0, MODELS[name]["vocab_size"], n)] for n in (70, 9, 33)]
    want = [torch_model.logits(t) for t in texts]
    scale = max(float(np.abs(w).max()) for w in want)
    sequences = [runner.sequence(t) for t in texts]

    def off(found: np.ndarray, expected: list[np.ndarray]) -> float:
        difference = np.abs(found - np.stack(expected)).max() / scale
        return float(difference) if np.isfinite(found).all() else float("nan")

    first = off(runner.step((sequences[0], 40, 40)), list(want[0][:40]))
    mixed = runner.step((sequences[0], 26, 1), (sequences[1], 5, 5), (sequences[2], 29, 2))
    first = max(first, off(mixed, [want[0][65], *want[1][:5], *want[2][27:29]]))
    decode = 0.0
    for i in range(4):
        found = runner.step(*((s, 1, 1) for s in sequences))
        decode = max(decode, off(found, [want[0][66 + i], want[1][5 + i], want[2][29 + i]]))
    runner.executor.close()
    return first, decode


def _decode_speed(folder: Path, graphs: bool, batch: int, context: int = 128, tokens: int = 64) -> tuple[float, float, float]:
    """Seconds of loading, prefill tokens per second, and decode steps per second, sampling left out."""
    runner = Runner(folder, graphs, batch * 32)
    limits = runner.manifest.limits
    sequences = [runner.sequence([1] * (context + tokens + 8)) for _ in range(batch)]

    def timed(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    rows = min(context, limits.max_rows)
    prefill = [timed(lambda s=s: runner.step((s, rows, 1))) for s in sequences]  # type: ignore[misc]
    for _ in range(4):
        runner.step(*((s, 1, 1) for s in sequences))
    steps = timed(lambda: [runner.step(*((s, 1, 1) for s in sequences)) for _ in range(tokens)])
    runner.executor.close()
    return runner.load_seconds, rows / min(prefill), tokens / steps


def run(folder: Path, graphs: bool) -> int:
    """Check and time every artifact of ``folder``; 1 if one is wrong."""
    lines, wrong = [], 0
    for artifact in sorted(p for p in folder.iterdir() if (p / "manifest.json").is_file()):
        fill_weights(artifact)
        prefill, decode = _check(artifact.name, artifact, graphs)
        dtype = json.loads((artifact / "manifest.json").read_text())["options"]["dtype"]
        right = prefill < TOLERANCE[dtype] and decode < TOLERANCE[dtype]  # NaN is not
        wrong += not right
        verdict = "right" if right else "WRONG"
        for batch in (1, 8):
            load, read, steps = _decode_speed(artifact, graphs, batch)
            lines.append(
                f"| {artifact.name} | {dtype} | {verdict} | {prefill:.1e} | {decode:.1e} | {batch} | {load:.2f} "
                f"| {read:.0f} | {steps:.1f} | {steps * batch:.0f} | {1e3 / steps:.3f} |"
            )
    print("| model | dtype | logits | prefill error | decode error | batch | load s | prefill tok/s | steps/s | tok/s | ms/step |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(TOLERANCE))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--no-graphs", action="store_true", help="run decode steps without CUDA graphs")
    args = parser.parse_args()
    if args.what == "run":
        return run(args.folder, not args.no_graphs)
    prepare(args.folder, args.target, args.dtype, args.models.split(","))
    return 0


if __name__ == "__main__":
    sys.exit(main())
