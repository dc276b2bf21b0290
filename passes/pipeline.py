"""The compiler's middle, as a list: from an importer's graph to a module that ``relax.build`` turns into code.

Graph passes work on one dataflow block (:class:`~llmc.passes.rewrite.Graph`), module passes on the IRModule of both phases.
Each has a module of its own whose docstring shows what it does. After every pass the dialect's invariants are verified, and
with ``dump_ir`` the IR is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import tvm
from tvm import relax, tirx

from llmc import targets
from llmc.dialect.norm_linear import OP as NORM_LINEAR
from llmc.errors import InternalError, OutputError
from llmc.importer.params import ParamTable
from llmc.manifest import FunctionInfo, KernelChoice, KvLayer
from llmc.passes.choices import DEFAULT
from llmc.passes.fingerprint import graph_sha256
from llmc.passes.fold_gain import fold_gain
from llmc.passes.fold_norm import fold_norm
from llmc.passes.fuse_append import fuse_append
from llmc.passes.fuse_attend import fuse_attend
from llmc.passes.fuse_epilogue import fuse_bias, fuse_epilogue
from llmc.passes.fuse_gated import Takes, fuse_gated
from llmc.passes.fuse_norm import fuse_norm
from llmc.passes.fuse_rope import fuse_rope
from llmc.passes.lower_kernels import KernelLibrary, generated_choice, kernel_call, lower_kernels
from llmc.passes.memory import kernel_calls, lower_vm, plan_memory, storage_sizes
from llmc.passes.merge_projections import merge_projections
from llmc.passes.one_region import one_region
from llmc.passes.paged_attention import paged_attention
from llmc.passes.phases import phases
from llmc.passes.quantize.options import ROUND_TO_NEAREST, QuantOptions
from llmc.passes.quantize.plan import Plan, assign
from llmc.passes.quantize.quantize_weights import quantize_weights
from llmc.passes.quantize.report import Stored
from llmc.passes.rewrite import Graph
from llmc.passes.sampling import FUNCTIONS as SAMPLING
from llmc.passes.sampling import add_sampling, samples_on_device
from llmc.passes.shapes import dims
from llmc.passes.simplify import simplify
from llmc.passes.sink_permutes import sink_permutes
from llmc.passes.verify_dialect import Verifier
from llmc.passes.widen import widen
from llmc.schedules.lookup import Records
from llmc.schedules.registry import takes
from llmc.targets import dependent_launch
from llmc.targets.base import Target

if TYPE_CHECKING:
    from llmc.passes.quantize.calibrate import Calibration

PHASES = ("decode", "extend")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Options:
    """What the module is compiled for: the KV cache's layout, and the largest step that memory is planned for.

    ``page_size``: positions in a page; ``kv_dtype``: of stored keys and values; ``context``: most positions of a sequence;
    ``max_batch``: sequences in a step; ``max_rows``: tokens in an extend step; ``max_logit_rows``: rows with logits in one;
    ``quantization``: how weights are stored; ``unfused``, ``chunks``: as :class:`llmc.passes.choices.Choices` has them;
    ``calibration``: the text that methods other than rounding to nearest look at;
    ``records``: the measurements that kernels get their configurations from.
    """

    page_size: int = 32
    kv_dtype: str = "float32"
    context: int = 4096
    max_batch: int = 8
    max_rows: int = 512
    max_logit_rows: int = 64
    quantization: QuantOptions = field(default_factory=QuantOptions)
    calibration: Calibration | None = None
    records: Records | None = None
    unfused: frozenset[str] = DEFAULT.unfused
    chunks: int = DEFAULT.chunks

    def upper_bounds(self, phase: str) -> dict[str, int]:
        """The most that each symbolic dimension of ``phase`` can be."""
        bounds = {"b": self.max_batch, "m": -(-self.context // self.page_size)}
        if phase == "extend":
            bounds |= {"n": self.max_rows, "r": self.max_logit_rows}
        return bounds


@dataclass
class Lowered:
    """``mod`` is ready for ``relax.build(mod, tvm_target, relax_pipeline=None)``.

    ``weights`` names the weight arguments of both phases in order; ``timings``: seconds per pass in order.
    ``stored``: how each weight is stored; rounding errors are known once the weights have been read.
    """

    mod: tvm.IRModule
    kv_layers: list[KvLayer]
    weights: list[str]
    functions: list[FunctionInfo]
    kernels: list[KernelChoice]
    graph_sha256: str
    timings: list[tuple[str, float]]
    stored: list[Stored]


@dataclass
class _State:
    """What the passes read and change. ``graphs`` is one graph until the phases split, and unused once ``module`` exists."""

    graphs: list[Graph]
    params: ParamTable
    target: Target
    options: Options
    plan: Plan
    tvm_target: Any = None
    module: tvm.IRModule | None = None
    kv_layers: list[KvLayer] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    library: KernelLibrary | None = None
    functions_in_order: tuple[str, ...] = PHASES
    functions: list[FunctionInfo] = field(default_factory=list)
    kernels: list[KernelChoice] = field(default_factory=list)


def _calibrate(s: _State) -> None:
    asked, text = s.options.quantization, s.options.calibration
    if not asked.calibrated:
        return
    if text is None:
        raise InternalError(f"{asked.described()} was asked for without calibration text")
    if asked.target_bpw is not None:
        from llmc.passes.quantize.budget import spend

        spend(s.graphs[0], s.params, s.plan.free, asked.target_bpw, s.target, text.windows[0], text.progress)
    if asked.method != ROUND_TO_NEAREST:
        from llmc.passes.quantize.calibrate import calibrate

        calibrate(s.graphs[0], s.params, asked.method, s.target, text)


def _fold_gain(s: _State) -> None:
    scaled = s.options.quantization.method in ("awq", "smoothquant")  # they put scales of their own into the norms
    families = targets.module_for(s.target).families(s.target)
    if "norm" not in s.options.unfused and not scaled and any(family.OP == NORM_LINEAR for family in families):
        fold_gain(s.graphs[0], s.params)


def _fuse_gated(s: _State) -> None:
    if "gated" in s.options.unfused:
        return
    families = targets.module_for(s.target).families(s.target)
    fuse_gated(s.graphs[0], lambda layer, y: all(takes(kernel_call(layer, y, p), s.target, families) for p in PHASES))


def _paged_attention(s: _State) -> None:
    s.kv_layers = paged_attention(s.graphs[0], s.options.page_size, s.options.kv_dtype)


def _phases(s: _State) -> None:
    s.graphs = list(phases(s.graphs[0]))
    for graph in s.graphs:
        graph.attrs["tir_var_upper_bound"] = s.options.upper_bounds(graph.name)
    s.weights = [p.name for p in s.graphs[0].params[s.graphs[0].inputs :]]


def _fuse_append(s: _State) -> None:
    if "append" in s.options.unfused:
        return
    for graph in s.graphs:
        fuse_append(graph)


def _fuse_in_decode(s: _State, fuse: Callable[[Graph, Takes], None]) -> None:
    """Run ``fuse`` on the decode phase, with what the target has kernels for there."""
    families = targets.module_for(s.target).families(s.target)
    decode = next(graph for graph in s.graphs if graph.name == "decode")
    fuse(decode, lambda layer, y: takes(kernel_call(layer, y, "decode"), s.target, families))


def _fuse_attend(s: _State) -> None:
    if "attend" in s.options.unfused:
        return
    _fuse_in_decode(s, fuse_attend)


def _fold_norm(s: _State) -> None:
    if "norm" in s.options.unfused:
        return
    _fuse_in_decode(s, fold_norm)


def _lower_kernels(s: _State) -> None:
    module = targets.module_for(s.target)
    s.tvm_target = module.tvm_target(s.target)
    early = "early" not in s.options.unfused
    s.module, s.library = lower_kernels(s.graphs, s.target, module.families(s.target), s.tvm_target, s.options.records, early)


def _sampling(s: _State) -> None:
    if not samples_on_device(targets.module_for(s.target).families(s.target)):
        return
    assert s.library is not None
    vocab, o = int(dims(s.graphs[0].output)[-1]), s.options
    s.module = add_sampling(s.module, s.library, vocab, o.page_size, o.max_batch, o.max_logit_rows, o.upper_bounds("decode")["m"])
    s.functions_in_order += SAMPLING


def _fuse_operators(s: _State) -> None:
    with s.tvm_target:
        for step in (
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(list(s.functions_in_order)),
        ):
            s.module = step(s.module)


def _schedule(s: _State) -> None:
    assert s.module is not None
    schedule = targets.module_for(s.target).schedule
    for var, function in list(s.module.functions.items()):
        if isinstance(function, tirx.PrimFunc) and not function.attrs.get("tirx.is_scheduled", False):
            s.module.update_func(var, schedule(function, s.target))


def _plan_memory(s: _State) -> None:
    s.module = plan_memory(s.module, s.functions_in_order, s.tvm_target)
    assert s.library is not None
    chosen = s.library.choices()
    handwritten = {k.kernel for k in chosen}
    for name in s.functions_in_order:
        calls = kernel_calls(s.module[name])
        sizes = storage_sizes(s.module[name])
        s.functions.append(FunctionInfo(name, sum(sizes), sum(len(c) for c in calls.values()), sizes))
        s.kernels += [k for k in chosen if k.function == name]
        s.kernels += [generated_choice(name, kernel, c) for kernel, c in calls.items() if kernel not in handwritten]


def _one_region(s: _State) -> None:
    if "step" not in s.options.unfused:
        for name in PHASES:
            s.module = one_region(s.module, name, s.target, few_rows=name == "decode", chunks=s.options.chunks)


def _lower_vm(s: _State) -> None:
    if "early" in s.options.unfused:
        s.module = dependent_launch.forbid(s.module)
    s.module = lower_vm(s.module, s.tvm_target)


PASSES: list[tuple[str, Callable[[_State], None]]] = [
    ("simplify", lambda s: simplify(s.graphs[0], s.params)),
    ("fuse_norm", lambda s: fuse_norm(s.graphs[0], s.params)),
    ("fuse_rope", lambda s: fuse_rope(s.graphs[0])),
    ("sink_permutes", lambda s: sink_permutes(s.graphs[0])),
    ("simplify_layouts", lambda s: simplify(s.graphs[0], s.params)),
    ("fuse_bias", lambda s: fuse_bias(s.graphs[0])),
    ("fold_gain", _fold_gain),
    ("assign_schemes", lambda s: assign(s.graphs[0], s.params, s.plan, s.target)),
    ("calibrate", _calibrate),
    ("merge_projections", lambda s: merge_projections(s.graphs[0], s.params)),
    ("fuse_epilogue", lambda s: fuse_epilogue(s.graphs[0])),
    ("simplify_slices", lambda s: simplify(s.graphs[0], s.params)),
    ("widen", lambda s: widen(s.graphs[0])),
    ("quantize", lambda s: quantize_weights(s.graphs[0], s.params, s.plan, s.target)),
    ("fuse_gated", _fuse_gated),
    ("paged_attention", _paged_attention),
    ("phases", _phases),
    ("fuse_append", _fuse_append),
    ("fuse_attend", _fuse_attend),
    ("fold_norm", _fold_norm),
    ("lower_kernels", _lower_kernels),
    ("sampling", _sampling),
    ("fuse_operators", _fuse_operators),
    ("plan_memory", _plan_memory),
    ("schedule", _schedule),  # after plan_memory, which may add a kernel that copies the result
    ("one_region", _one_region),
    ("lower_vm", _lower_vm),
]


def lower(
    mod: tvm.IRModule,
    params: ParamTable,
    target: Target,
    options: Options,
    dump_ir: Path | None = None,
    progress: Progress | None = None,
) -> Lowered:
    """Run every pass over the graph ``main`` of ``mod``; ``params`` is changed to what the compiled functions take.

    ``dump_ir``: a folder that gets ``NN_pass.txt`` after every pass and ``timing.json``. ``progress(done, total, pass)``.
    Raises UnsupportedError if the target has no kernel for an operator, InternalError if a pass breaks an invariant.
    """
    graph = Graph.of("main", mod["main"])
    digest = graph_sha256(graph)
    graph.remove_unused_params(params)
    state = _State([graph], params, target, options, Plan(options.quantization))
    verifier = Verifier(params)
    timings: list[tuple[str, float]] = []
    verifier.graph("import", graph)
    _dump(dump_ir, 0, "import", state)
    for index, (name, run) in enumerate(PASSES):
        if progress is not None:
            progress(index, len(PASSES), name)
        start = time.perf_counter()
        run(state)
        timings.append((name, time.perf_counter() - start))
        _verify(verifier, name, state)
        _dump(dump_ir, index + 1, name, state)
    if dump_ir is not None:
        _write(dump_ir / "timing.json", json.dumps(dict(timings), indent=1) + "\n")
    if progress is not None:
        progress(len(PASSES), len(PASSES), "done")
    return Lowered(state.module, state.kv_layers, state.weights, state.functions, state.kernels, digest, timings, state.plan.stored)


def _verify(verifier: Verifier, name: str, state: _State) -> None:
    if state.module is not None:
        verifier.module(name, state.module)
        return
    for graph in state.graphs:
        verifier.graph(name, graph)
    orders = {tuple(p.name for p in g.params[g.inputs :]) for g in state.graphs}
    if len(orders) != 1:
        raise InternalError(f"after pass {name}: the phases take different weights")


def _dump(folder: Path | None, index: int, name: str, state: _State) -> None:
    if folder is None:
        return
    module = state.module
    if module is None:
        module = tvm.IRModule({g.name: g.function() for g in state.graphs})
    try:
        text = module.script(show_meta=False)
    except (ValueError, TypeError, RuntimeError):
        text = tvm.ir.save_json(module)  # the text printer does not know every operator that passes make
    _write(folder / f"{index:02d}_{name}.txt", text)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"--dump-ir cannot write {path} ({error.strerror}): choose a folder with room that you may write to"
        ) from error
