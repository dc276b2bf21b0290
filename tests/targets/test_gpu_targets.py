"""ROCm, Metal and OpenCL: names, and whole models compiled on a machine that has none of that hardware."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import pytest
import tvm

from llmc import targets
from llmc.compiler import compile as compile_model
from llmc.errors import InternalError, UsageError
from llmc.schedules.gpu import FAMILIES, quantized_gemv, quantized_moe, rope_append
from llmc.targets import code_object
from llmc.targets.base import GpuTarget, Target
from llmc.targets.gpu_pipeline import PIPELINE
from llmc.targets.limits import METAL, OPENCL, ROCM
from tests.support.metal import check

SPECS = [f"{kind}:{arch}" for kind, table in (("rocm", ROCM), ("metal", METAL), ("opencl", OPENCL)) for arch in table]


amd = pytest.mark.parametrize("arch", [a if a in ("gfx942", "gfx1100") else pytest.param(a, marks=pytest.mark.slow) for a in ROCM])
"""AMD architectures: one of each size of waves in the default run."""


@pytest.mark.parametrize("spec", SPECS)
def test_specs(spec: str) -> None:
    target = targets.parse(spec)
    assert isinstance(target, GpuTarget) and target.name == spec and targets.parse(target.name) == target
    described = targets.module_for(target).tvm_target(target)
    assert described.kind.name == target.kind
    assert int(described.attrs["max_threads_per_block"]) == target.max_threads
    assert int(described.attrs["max_shared_memory_per_block"]) == target.shared_memory


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rocm:gfx941", ["gfx941", "there is rocm:gfx90a, rocm:gfx942", "nearest: rocm:gfx942"]),
        ("rocm", ["'rocm' names no GPU architecture", "rocm:gfx1100"]),
        ("metal:apple6", ["apple6", "metal:apple7"]),
        ("openclx", ["unknown target", "did you mean opencl:generic?"]),
    ],
)
def test_unknown_architectures_name_what_there_is(spec: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        targets.parse(spec)
    assert all(word in str(caught.value) for word in words), caught.value


def compiled(model: Path, out: Path, spec: str) -> bytes:
    """The library of a model compiled for a target, after what holds for every portable target."""
    report = compile_model(str(model), out=out, target=spec, dtype="bfloat16", context=64)
    (variant,) = report.manifest.variants
    dialect = {k.op: k.family for k in variant.kernels if k.op != "relax"}
    assert set(dialect) >= {"llmc.linear", "llmc.attend", "llmc.rope_append", "llmc.rms_norm"}
    assert all(family.startswith("gpu.") for family in dialect.values())
    return (out / variant.library).read_bytes()


@amd
def test_a_model_as_amd_code_objects(arch: str, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    target = targets.parse(f"rocm:{arch}")
    assert isinstance(target, GpuTarget)
    (code,) = code_object.find(compiled(tiny_model_dir("mixtral"), tmp_path / "artifact", target.name))
    found = code_object.parse(code)
    assert found.arch == arch and found.target.endswith(arch)
    assert {"attend_decode", "attend_extend", "gemm_matrix", "gemv", "moe", "rms_norm", "rope_append", "topk"} <= {
        re.sub(r"_\d.*", "", kernel.name) for kernel in found.kernels
    }
    for kernel in found.kernels:
        assert kernel.wave == target.warp_size and kernel.threads >= target.max_threads, kernel
        assert kernel.lds <= target.shared_memory and kernel.vgprs <= target.vector_registers, kernel
        assert kernel.scratch == 0 and kernel.spills == 0, kernel


def test_what_is_no_code_object_is_refused() -> None:
    with pytest.raises(InternalError, match="no 64-bit ELF file for AMD GPUs"):
        code_object.parse(Path(sys.executable).read_bytes())


@pytest.mark.parametrize("arch", [a if a == "gfx942" else pytest.param(a, marks=pytest.mark.slow) for a in ROCM])  # a minute each
def test_every_portable_kernel_is_legal_amd_assembly_without_scratch(arch: str, tmp_path: Path) -> None:
    """Clang's assembler for the architecture reads what the code generator wrote: each instruction exists there."""
    target = targets.parse(f"rocm:{arch}")
    functions = {}
    for family in FAMILIES:
        for label, call in _buildable(family, target):
            name = f"{family.NAME}_{label}".replace(".", "_")
            config = {axis: values[0] for axis, values in family.space(call, target).items()}
            functions[name] = family.build(call, target, config).with_attr("global_symbol", name)
    text = _generated(functions, target, "asm")
    assert set(re.findall(r"\.private_segment_fixed_size: (\d+)", text)) == {"0"}
    assert set(re.findall(r"\.[vs]gpr_spill_count: (\d+)", text)) == {"0"}
    assembly = tmp_path / "kernels.s"
    assembly.write_text(text.replace("amdhsa-hcc-", "amdhsa--"), encoding="utf-8")
    command = [sys.executable, "-m", "ziglang", "clang", "--target=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-c", "-x", "assembler"]
    subprocess.run([*command, str(assembly), "-o", str(tmp_path / "kernels.o")], check=True)


@pytest.mark.parametrize("family", [f if f == "apple7" else pytest.param(f, marks=pytest.mark.slow) for f in METAL])
def test_a_model_as_metal_source_in_a_macos_library(family: str, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    library = compiled(tiny_model_dir("mixtral"), tmp_path / "artifact", f"metal:{family}")
    assert library[:8] == b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"  # 64-bit Mach-O for arm64
    assert int.from_bytes(library[12:16], "little") == 6  # a dynamic library
    assert library.count(b"#include <metal_stdlib>") >= 9


@pytest.mark.parametrize("kernels", FAMILIES, ids=lambda f: f.NAME)
def test_every_portable_kernel_is_legal_metal(kernels: Any) -> None:
    target = targets.parse("metal:apple7")
    assert isinstance(target, GpuTarget)
    source = device_source(kernels, target)
    assert check.diagnostics(source) == ""
    assert check.wrong_casts(source) == []
    memory = check.threadgroup_memory(source)
    assert memory and max(memory.values()) <= target.shared_memory


def _buildable(family: Any, target: GpuTarget) -> list[tuple[str, Any]]:
    """The shapes of a family that the target has kernels for; of products that are long, one, and of quantized experts one for each
    phase: their schemes are those of the products."""
    taken = [(label, call) for label, call in family.SHAPES.items() if family.matches(call, target) is not None]
    if family is quantized_moe:
        return [next(pair for pair in taken if pair[1].phase == phase) for phase in ("decode", "extend")]
    return taken[-1:] if "matrix" in family.NAME or family is quantized_gemv else taken


def _generated(functions: dict[str, Any], target: Target, form: str = "") -> str:
    """The device code of kernels: source, or in the ``form`` that the code generator has besides."""
    tvm_target = targets.module_for(target).tvm_target(target)
    with tvm_target:
        module = tvm.tirx.build(tvm.IRModule(functions), target=tvm_target, pipeline=PIPELINE)
    return str(module.imports[0].inspect_source(form))


def device_source(family: Any, target: GpuTarget) -> str:
    """The device code of all of a family's shapes."""
    functions = {}
    for label, call in _buildable(family, target):
        config = {axis: values[0] for axis, values in family.space(call, target).items()}
        functions[label] = family.build(call, target, config).with_attr("global_symbol", f"k_{label}")
    return _generated(functions, target)


@pytest.mark.parametrize("spec", ["metal:apple7", "opencl:generic"])
def test_numbers_of_more_than_seven_digits_reach_the_source(spec: str) -> None:
    """1.5 · 2^23, which rounds codes of keys, is 12582912; TVM would write 1.258291e+07."""
    target = targets.parse(spec)
    assert isinstance(target, GpuTarget)
    call = rope_append.SHAPES["int8_9x3x64"]
    function = rope_append.build(call, target, {}).with_attr("global_symbol", "k")
    text = _generated({"k": function}, target)
    assert "1.258291e+07" not in text and str(0x4B400000) in text


def test_the_check_of_metal_finds_what_is_wrong() -> None:
    legal = (
        "// Function: k\nkernel void k(device float* x [[ buffer(0) ]]) {\n  threadgroup float t[4];\n"
        "  t[0] = *(device float*)(x + 1);\n}\n"
    )
    assert check.diagnostics(legal) == "" and check.wrong_casts(legal) == []
    assert "undeclared" in check.diagnostics(legal.replace("t[0]", "u[0]"))
    assert "cannot initialize" in check.diagnostics(legal.replace("t[0] =", "device float* p = t; t[0] ="))
    assert check.wrong_casts(legal.replace("(device float*)", "(threadgroup float*)")) == ["(threadgroup float*)(x +"]
    assert check.threadgroup_memory(legal) == {"k": 16}


def test_a_model_as_opencl(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    library = compiled(tiny_model_dir("llama"), tmp_path / "artifact", "opencl:generic")
    assert library[:4] == b"\x7fELF" and b"__kernel void" in library
