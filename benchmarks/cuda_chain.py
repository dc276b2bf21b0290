"""A decoder layer's kernels on sm_90a one after another, as a decode step runs them: what hand-overs cost, and which linear wins.

    python benchmarks/cuda_chain.py build DIR [--only 8b-bf16,...]    with llmc and nvcc, no GPU: kernels.so and cases.json
    python benchmarks/cuda_chain.py run DIR                           on an sm_90a GPU with torch and the TVM runtime

A layer is norm, qkv, rope and append, attention, o, norm, gate and up, down; with the norms inside the linears behind them, six
kernels, and with rotation and append inside attention five. ``run`` puts :data:`LAYERS` of them, each with weights
of its own, into a CUDA graph for every set of linear kernels in :data:`SETS`, compares the result with that of the first set, and
prints the microseconds of a layer, next to those of moving its weights at the copy bandwidth of the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cuda_timing import copy_bandwidth, load, microseconds

LAYERS, CONTEXT, PAGE = 16, 256, 32
REPEATS = 15
TOLERANCE = 4e-2
"""Relative error of the last layer's result between two sets of kernels: rounding of 16-bit activations, :data:`LAYERS` times."""


@dataclass(frozen=True)
class Model:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    d: int

    @property
    def linears(self) -> dict[str, tuple[int, int, dict[str, Any]]]:
        """Role -> outputs, k, attributes."""
        qkv = (self.heads + 2 * self.kv_heads) * self.d
        return {
            "qkv": (qkv, self.hidden, {}),
            "o": (self.hidden, self.heads * self.d, {"residual": 1}),
            "gate_up": (2 * self.inner, self.hidden, {"activation": "silu_gated"}),
            "down": (self.hidden, self.inner, {"residual": 1}),
        }


MODELS = {"8b": Model(4096, 14336, 32, 8, 128), "1b": Model(2048, 8192, 32, 8, 64)}


@dataclass(frozen=True)
class Linears:
    """``families``: the first that takes a linear builds it; ``norm``: whether qkv, gate and up take their norm themselves;
    ``append``: whether attention rotates and appends.

    ``roles``: other families for some of the linears; ``settings``: what differs from the first family's default configuration.
    """

    families: tuple[str, ...]
    norm: bool = False
    append: bool = False
    roles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


DENSE = {
    "gemv": Linears(("gemv",)),
    "gemv, norm inside": Linears(("gemv",), True),
    "ring": Linears(("ring_gemv", "gemv")),
    "ring, norm inside": Linears(("ring_gemv", "gemv"), True),
    "ring, norm and append inside": Linears(("ring_gemv", "gemv"), True, True),
}
QUANTIZED = {
    "gemv": Linears(("quantized_gemv",)),
    "gemv, norm inside": Linears(("quantized_gemv",), True),
    "gemv, norm and append inside": Linears(("quantized_gemv",), True, True),
}
STREAMED = ("quantized_ring", "quantized_gemv")
FOR_ONE = {"split": [8, 2], "columns": 1}
BYTES = {
    **QUANTIZED,
    "ring, norm and append inside": Linears(STREAMED, True, True),
    "ring but for o, norm and append inside": Linears(STREAMED, True, True, roles={"o": ("quantized_gemv",)}),
    "ring for gate and up, norm and append inside": Linears(
        STREAMED, True, True, roles=dict.fromkeys(("o", "qkv", "down"), ("quantized_gemv",))
    ),
    "ring for one row, norm and append inside": Linears(STREAMED, True, True, settings=FOR_ONE),
    "ring for one row but for o, norm and append inside": Linears(
        STREAMED, True, True, roles={"o": ("quantized_gemv",)}, settings=FOR_ONE
    ),
}
SETS: dict[str, dict[str, Linears]] = {
    "8b-bf16": DENSE, "1b-bf16": DENSE, "8b-int8": BYTES, "8b-fp8_e4m3": BYTES, "1b-int8": BYTES,
    "8b-int4_g128": QUANTIZED, "1b-int4_g128": QUANTIZED,
}  # fmt: skip
"""Model and weights -> label -> kernels of the linears."""

NORMED = ("qkv", "gate_up")
"""Linears behind a norm."""

ROWS = (1, 8)


def build(folder: Path, only: list[str]) -> None:
    """Compile the layers' kernels into one library."""
    import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

    # isort: split
    import importlib

    import tvm

    from llmc.schedules.cuda import decode_attention, linear_call, rope_attention
    from llmc.schedules.cuda.input_norm import normed
    from llmc.schedules.gpu import norm, quantized_call, rope_append
    from llmc.targets import cuda, cuda_tools
    from llmc.targets.link import linker

    target = cuda.parse("cuda:sm_90a")
    functions: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {}

    built: dict[tuple[str, Any, bool, str], str] = {}

    def add(family: Any, call: Any, norm: bool = False, settings: dict[str, Any] | None = None) -> str:
        """The name of the kernel in the default configuration, changed by ``settings`` if it has such a split."""
        key = family.NAME, call, norm, str(settings)
        if key not in built:
            space, changes = family.space(call, target), settings or {}
            if "split" not in changes or changes["split"] in space["split"]:
                space = {**space, **{axis: [value] for axis, value in changes.items()}}
            config = {axis: values[0] for axis, values in space.items()}
            name = built[key] = f"kernel_{len(functions)}"
            functions[name] = family.build(normed(call) if norm else call, target, config).with_attr("global_symbol", name)
        return built[key]

    for subject, sets in SETS.items():
        if only and subject not in only:
            continue
        model, scheme = MODELS[subject.split("-")[0]], subject.split("-")[1]
        calls = {
            role: linear_call.sample(o, k, phase="decode", **attrs)
            if scheme == "bf16"
            else quantized_call.make(o, k, scheme, **attrs)
            for role, (o, k, attrs) in model.linears.items()
        }
        parts = {role: call.args[1 : len(call.args) - bool(call.attr("residual"))] for role, call in calls.items()}
        cases[subject] = {
            "weights": {role: [(spec.shape, spec.dtype) for spec in specs] for role, specs in parts.items()},
            "sets": {},
        }
        small = {
            "norm": add(norm.rms_norm, norm._rms(("n", model.hidden))),
            "rope_append": add(rope_append, rope_append.make_call(model.heads, model.kv_heads, model.d, page_size=PAGE)),
            "attend": add(decode_attention, decode_attention._call(model.heads, model.kv_heads, model.d, page_size=PAGE)),
            "rope_attend": add(rope_attention, rope_attention._call(model.heads, model.kv_heads, model.d, page_size=PAGE)),
        }
        for label, how in sets.items():
            linears = {}
            for role, call in calls.items():
                names = how.roles.get(role, how.families)
                families = [importlib.import_module(f"llmc.schedules.cuda.{name}") for name in names]
                family = next(f for f in families if f.matches(call, target))
                settings = how.settings if names[0] == how.families[0] and family is families[0] else {}
                linears[role] = add(family, call, how.norm and role in NORMED, settings)
            left_out = {"rope_append", "attend"} if how.append else {"rope_attend"}
            left_out |= {"norm"} if how.norm else set()
            others = {role: name for role, name in small.items() if role not in left_out}
            cases[subject]["sets"][label] = others | linears
    cuda_tools.prepare()
    with cuda.tvm_target(target) as tvm_target:
        module = tvm.compile(tvm.IRModule(functions), target=tvm_target, tir_pipeline=cuda.PIPELINE)
    folder.mkdir(parents=True, exist_ok=True)
    module.export_library(str(folder / "kernels.so"), fcompile=linker(target))
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    print(f"{len(functions)} kernels in {folder / 'kernels.so'}")


class Layers:
    """Weights, caches and buffers of a model for ``n`` sequences."""

    def __init__(self, model: Model, weights: dict[str, list[tuple[list[int], str]]], n: int) -> None:
        import torch
        import tvm_ffi

        def bf16(*shape: int, scale: float = 1.0) -> Any:
            return (torch.randn(*shape, device="cuda") * scale).bfloat16()

        self.model, self.n = model, n

        def part(role: str, shape: list[int], dtype: str) -> Any:
            """Random weights; codes of every value, and scales to match."""
            _, k, attrs = model.linears[role]
            if dtype == "int32":
                return torch.randint(-(2**31), 2**31, shape, device="cuda", dtype=torch.int64).int()
            matrix = len(weights[role]) == 1
            scale = (0.1 if attrs.get("residual") else 1.0) / k**0.5
            values = torch.randn(*shape, device="cuda") if matrix else torch.rand(*shape, device="cuda") / 64
            return (values * scale).to(getattr(torch, dtype))

        self.weights = [
            {role: [part(role, shape, dtype) for shape, dtype in specs] for role, specs in weights.items()} for _ in range(LAYERS)
        ]
        pages = n * (CONTEXT // PAGE)
        self.pages = [bf16(pages, model.kv_heads, PAGE * 2 * model.d) for _ in range(LAYERS)]
        table = torch.randperm(pages, device="cuda").reshape(n, -1).int()
        where = {
            "table": table, "lens": torch.full((n,), CONTEXT, device="cuda", dtype=torch.int32),
            "starts": torch.arange(n + 1, device="cuda", dtype=torch.int32),
            "slots": (table[:, -1] * PAGE + PAGE - 1).int(), "gain": torch.ones(model.hidden, device="cuda").bfloat16(),
            "cos": torch.rand(n, model.d, device="cuda"), "sin": torch.rand(n, model.d, device="cuda"),
            "x": bf16(n, model.hidden), "y": bf16(n, model.hidden), "z": bf16(n, model.hidden), "normed": bf16(n, model.hidden),
            "qkv": bf16(n, model.linears["qkv"][0]), "q": bf16(n, model.heads, model.d), "heads": bf16(n, model.heads, model.d),
            "inner": bf16(n, model.inner),
        }  # fmt: skip
        self.tensors = where
        self.v = {name: tvm_ffi.from_dlpack(t) for name, t in where.items()}
        self.v["flat"] = tvm_ffi.from_dlpack(where["heads"].reshape(n, -1))
        self.views = [
            {
                **{role: [tvm_ffi.from_dlpack(w) for w in arrays] for role, arrays in own.items()},
                "pages": tvm_ffi.from_dlpack(pages),
            }
            for own, pages in zip(self.weights, self.pages, strict=True)
        ]

    def run(self, kernels: dict[str, Any], only: str = "") -> None:
        """All layers once, from ``x`` to ``z`` of the last; or the kernels of one role alone."""
        v = self.v
        for i, own in enumerate(self.views):
            x = v["x"] if i == 0 else v["z"]
            first, second = ((v["normed"],),) * 2 if "norm" in kernels else ((x,), (v["y"],))
            calls = [
                ("norm", (x, v["gain"], v["normed"])), ("qkv", (*first, *own["qkv"], v["qkv"])),
                ("rope_append", (v["qkv"], v["cos"], v["sin"], v["slots"], own["pages"], v["q"])),
                ("attend", (v["q"], own["pages"], v["table"], v["lens"], v["starts"], v["heads"])),
                ("rope_attend", (v["qkv"], v["cos"], v["sin"], v["slots"], own["pages"], v["table"], v["lens"], v["starts"],
                                 v["heads"])),
                ("o", (v["flat"], *own["o"], x, v["y"])), ("norm", (v["y"], v["gain"], v["normed"])),
                ("gate_up", (*second, *own["gate_up"], v["inner"])), ("down", (v["inner"], *own["down"], v["y"], v["z"])),
            ]  # fmt: skip
            for name, arguments in calls:
                if name in kernels and (not only or name == only):
                    kernels[name](*arguments)


def run(folder: Path) -> int:
    """Print the tables; the number of wrong results."""
    module = load(folder / "kernels.so")
    import torch

    torch.manual_seed(0)
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    limit, wrong = copy_bandwidth(), 0
    print(f"{torch.cuda.get_device_name()}: copy {limit / 1e12:.2f} TB/s; microseconds a layer")
    for subject, case in cases.items():
        model, sets = MODELS[subject.split("-")[0]], case["sets"]
        for n in ROWS:
            layers = Layers(model, case["weights"], n)
            moved = sum(a.numel() * a.element_size() for arrays in layers.weights[0].values() for a in arrays)
            print(f"{subject} n={n}: weights alone {moved / limit * 1e6:.1f}")
            wanted = None
            for label, names in sets.items():
                kernels = {role: module[name] for role, name in names.items()}
                layers.tensors["z"].fill_(float("nan"))
                layers.run(kernels)
                result = layers.tensors["z"].float()
                wanted = result if wanted is None else wanted
                error = float((result - wanted).norm() / wanted.norm())
                if not error < TOLERANCE:
                    wrong += 1
                    print(f"  WRONG {label}: error {error:.1e}")
                    continue
                whole = microseconds([partial(layers.run, kernels)], 1, REPEATS) / LAYERS
                alone = {role: microseconds([partial(layers.run, kernels, role)], 1, REPEATS) / LAYERS for role in kernels}
                parts = [f"{role} {time:.1f}" for role, time in alone.items()]
                print(f"  {whole:7.2f} {label} (error {error:.0e}; alone: {', '.join(parts)})", flush=True)
            del layers
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="models and weights to build, with commas between")
    options = parser.parse_args()
    if options.action == "run":
        return 1 if run(options.folder) else 0
    build(options.folder, [name for name in options.only.split(",") if name])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
