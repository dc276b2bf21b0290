"""Target names, and libraries linked for this machine and for others."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
import numpy as np
import pytest
import tvm
from tvm import relax

from llmc import targets
from llmc.errors import MissingExtraError, UsageError
from llmc.runtime import tile_registers
from llmc.schedules.cpu import attend, linear
from llmc.targets import cpu, link
from llmc.targets.base import Target
from tests.kernels.harness import random_arrays, tensor


def test_the_host_is_named_after_its_processor_and_parses_again() -> None:
    host = targets.parse("cpu")
    assert host.name.startswith("cpu:") and host.kind == "cpu"
    assert targets.parse(host.name) == host
    assert set(host.features) <= cpu._cpuinfo()


@pytest.mark.parametrize(
    ("spec", "bits", "registers", "has", "lacks"),
    [
        ("cpu:x86-64", 128, 16, set(), {"avx", "fma"}),
        ("cpu:x86-64-v2", 128, 16, {"sse4_2", "popcnt"}, {"avx"}),
        ("cpu:x86-64-v3", 256, 16, {"avx2", "fma", "f16c", "bmi1", "bmi2"}, {"avx512f"}),
        ("cpu:x86-64-v4", 512, 32, {"avx512f", "avx512vl", "avx512bw"}, {"avx512_bf16"}),
        ("cpu:znver4", 512, 32, {"avx512_bf16", "avx512_vnni"}, set()),
        ("cpu:sapphirerapids", 512, 32, {"amx_tile", "amx_int8", "amx_bf16", "avx512_vnni"}, set()),
        ("cpu:x86-64-v4+avx512vnni+amx-int8", 512, 32, {"amx_int8", "avx512_vnni"}, {"amx_bf16"}),
        ("cpu:skylake-avx512+noavx512f", 256, 16, {"avx2"}, {"avx512f"}),
        ("cpu:aarch64", 128, 32, {"asimd"}, {"asimddp"}),
        ("cpu:aarch64+neon", 128, 32, {"asimd"}, {"i8mm"}),
        ("cpu:aarch64+dotprod", 128, 32, {"asimd", "asimddp"}, {"i8mm"}),
        ("cpu:aarch64+i8mm+dotprod", 128, 32, {"asimddp", "i8mm"}, set()),
        ("cpu:neoverse-n1", 128, 32, {"asimddp"}, set()),
        ("cpu:apple-m1@macos", 128, 32, {"asimddp"}, {"i8mm"}),
        ("cpu:x86-64-v3@windows", 256, 16, {"avx2"}, {"avx512f"}),
        ("cpu:aarch64+dotprod@android", 128, 32, {"asimddp"}, {"i8mm"}),
    ],
)
def test_specs(spec: str, bits: int, registers: int, has: set[str], lacks: set[str]) -> None:
    target = targets.parse(spec)
    assert (target.vector_bits, target.vector_registers) == (bits, registers)
    assert has <= set(target.features) and not lacks & set(target.features)
    assert targets.parse(target.name) == target
    assert cpu.tvm_target(target).kind.name == "llvm"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cpuu", ["cpuu", "did you mean cpu", "cpu:x86-64-v3"]),
        ("tpu:v5", ["tpu:v5", "there is cpu"]),
        ("cpu:znver44", ["znver44", "cpu:znver4"]),
        ("cpu:x86-64-v9", ["x86-64-v9", "cpu:x86-64-v"]),
        ("cpu:aarch64+dotprods", ["dotprods", "did you mean dotprod"]),
        ("cpu:apple-m1@macosx", ["unknown operating system 'macosx'", "linux, macos, windows, android", "did you mean macos?"]),
    ],
)
def test_unknown_targets_name_what_there_is(spec: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        targets.parse(spec)
    assert all(word in str(caught.value) for word in words), caught.value


def test_features_hidden_by_a_hypervisor_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = targets.parse("cpu")
    if not full.triple.startswith("x86_64"):
        pytest.skip("names x86 features")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t: {' '.join(f for f in full.features if f != 'gfni' and not f.startswith('avx512'))}\n")
    monkeypatch.setattr(cpu, "CPUINFO", cpuinfo)
    masked = targets.parse("cpu")
    assert masked.vector_bits == 256 and not any(f.startswith("avx512") for f in masked.features)
    assert targets.parse(masked.name) == masked


def test_tile_registers_that_the_system_withholds_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ``cpu`` is compiled for must run here."""
    full = targets.parse("cpu:sapphirerapids")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t: {' '.join(full.features)}\n")
    monkeypatch.setattr(cpu, "CPUINFO", cpuinfo)
    monkeypatch.setattr(cpu.codegen, "llvm_get_system_cpu", lambda: "sapphirerapids")
    monkeypatch.setattr(tile_registers, "refusal", lambda: None)
    assert targets.parse("cpu") == full
    monkeypatch.setattr(tile_registers, "refusal", lambda: "Linux does not let this process use tile registers")
    assert targets.parse("cpu").name == "cpu:sapphirerapids+noamx-bf16+noamx-int8+noamx-tile"


def library(target: Target, path: Path) -> None:
    """Export a linear kernel behind a Relax function ``main(x, weight)``."""
    call = linear.SHAPES["square_576"]
    config = {axis: values[0] for axis, values in linear.space(call, target).items()}
    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x, w = (relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in (("x", (n, 576)), ("w", (576, 576))))
    kernel = builder.add_func(linear.build(call, target, config), "kernel")
    with builder.function("main", [x, w]):
        out = builder.emit(relax.call_tir(kernel, [x, w], out_ty=relax.TensorType((n, 576), "float32")))
        builder.emit_func_output(out)
    module = targets.module_for(target)
    module.export(relax.build(builder.get(), module.tvm_target(target)), target, str(path))


@pytest.mark.parametrize("spec", ["cpu", "cpu:x86-64-v3"])
def test_a_library_for_this_machine_computes(spec: str, tmp_path: Path) -> None:
    target = targets.parse(spec)
    if not set(target.features) <= cpu._cpuinfo():
        pytest.skip(f"this machine is no {spec}")
    library(target, tmp_path / "lib.so")
    vm = relax.VirtualMachine(tvm.runtime.load_module(str(tmp_path / "lib.so")), tvm.cpu())
    call = linear.SHAPES["square_576"]
    arrays = random_arrays(call, {"n": 5}, seed=0)
    result = vm["main"](*map(tensor, arrays)).numpy()
    np.testing.assert_allclose(result, linear.reference(call, *arrays), atol=1e-3)


def test_a_library_needs_nothing_but_the_c_library(tmp_path: Path) -> None:
    library(targets.parse("cpu"), tmp_path / "lib.so")
    ctypes.CDLL(str(tmp_path / "lib.so"))
    if shutil.which("readelf"):
        text = subprocess.run(["readelf", "-d", str(tmp_path / "lib.so")], capture_output=True, text=True, check=True).stdout
        needed = {line.split("[")[1].split("]")[0] for line in text.splitlines() if "NEEDED" in line}
        assert needed <= {"libc.so.6", "libm.so.6"}


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs ziglang")
@pytest.mark.parametrize("spec", ["cpu:aarch64+neon", "cpu:aarch64+dotprod+i8mm"])
def test_cross_compilation_makes_an_aarch64_library(spec: str, tmp_path: Path) -> None:
    library(targets.parse(spec), tmp_path / "lib.so")
    header = (tmp_path / "lib.so").read_bytes()[:20]
    assert header[:5] == b"\x7fELF\x02"  # 64 bit
    assert int.from_bytes(header[16:18], "little") == 3  # ET_DYN
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs ziglang")
@pytest.mark.parametrize(
    ("spec", "head"),
    [
        ("cpu:aarch64+dotprod@android", b"\x7fELF\x02\x01\x01"),
        ("cpu:apple-m1@macos", b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"),  # 64-bit Mach-O for arm64
    ],
)
def test_libraries_for_other_systems(spec: str, head: bytes, tmp_path: Path) -> None:
    library(targets.parse(spec), tmp_path / "lib.so")
    assert (tmp_path / "lib.so").read_bytes().startswith(head)


# Slow: the first link for Windows has ziglang build its C runtime, for a minute or more.
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_library_for_windows_names_the_one_it_imports_from(tmp_path: Path) -> None:
    library(targets.parse("cpu:x86-64-v3@windows"), tmp_path / "lib.so")
    code = (tmp_path / "lib.so").read_bytes()
    at = int.from_bytes(code[60:64], "little")
    assert code[:2] == b"MZ" and code[at : at + 6] == b"PE\x00\x00\x64\x86"  # for x86-64
    assert b"tvm_ffi.dll\x00" in code and b"__tvm_ffi_linear_576x576\x00" in code and b"__tvm_ffi__library_bin\x00" in code


def test_aarch64_kernels_use_fused_vector_arithmetic_and_the_stack() -> None:
    """Buffers of an attention task are tens of KB: from the system's allocator they would be page faults in every step."""
    target = targets.parse("cpu:aarch64+neon")
    calls = {"linear": (linear, linear.SHAPES["odd_37x100_f16_silu"]), "attend": (attend, attend.SHAPES["smollm2_extend"])}
    functions = {}
    for name, (family, call) in calls.items():
        config = {axis: values[0] for axis, values in family.space(call, target).items()}
        functions[name] = family.build(call, target, config).with_attr("global_symbol", name)
    assembly = cpu.build_kernels(tvm.IRModule(functions), target).inspect_source("asm")
    assert "AllocWorkspace" not in assembly
    assert "fmla" in assembly and not re.search(r"\bbl\s+(fma|exp|__extend|__trunc)", assembly)


def test_without_ziglang_a_cross_build_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install ziglang"):
        link.linker(targets.parse("cpu:aarch64+neon"))


def test_importing_tvm_leaves_torch_out_and_importable() -> None:
    code = (
        "import sys, llmc.tvm_setup, tvm; assert 'torch' not in sys.modules; "
        "import importlib.util; importlib.util.find_spec('torch')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
