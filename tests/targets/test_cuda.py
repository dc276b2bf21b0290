"""The CUDA target: names, and a model compiled on a machine without a GPU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import shutil
import struct
from pathlib import Path

import pytest

from llmc import manifest, targets
from llmc.errors import InternalError, MissingExtraError, UsageError
from llmc.runtime.device import ARCHITECTURES, CudaDevice
from llmc.targets import cuda, cuda_tools
from llmc.targets.base import GpuTarget


@pytest.mark.parametrize(("spec", "shared"), [("cuda:sm_80", 163), ("cuda:sm_89", 99), ("cuda:sm_90", 227), ("cuda:sm_90a", 227)])
def test_specs(spec: str, shared: int) -> None:
    target = targets.parse(spec)
    assert isinstance(target, GpuTarget) and target.kind == "cuda" and target.name == spec
    assert target.shared_memory == shared * 1024 and target.warp_size == 32
    assert targets.parse(target.name) == target
    assert cuda.tvm_target(target).attrs["arch"] == target.mcpu
    assert [cuda.compute_dtype(d) for d in ("float32", "bfloat16", "float16")] == ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cuda:sm_91", ["sm_91", "nearest", "cuda:sm_90"]),
        ("cuda:hopper", ["hopper", "there is cuda, cuda:sm_80"]),
        ("cude:sm_90a", ["unknown target 'cude:sm_90a'", "did you mean cuda:sm_90a?"]),
    ],
)
def test_unknown_architectures_name_what_there_is(spec: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        targets.parse(spec)
    assert all(word in str(caught.value) for word in words), caught.value


def test_cuda_alone_is_this_machines_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuda_devices", lambda: [CudaDevice(0, "NVIDIA Test", (9, 0), 132, 80 << 30)])
    assert targets.parse("cuda").name == "cuda:sm_90a"
    monkeypatch.setattr(cuda, "cuda_devices", lambda: [CudaDevice(0, "NVIDIA Newer", (12, 1), 48, 80 << 30)])
    assert targets.parse("cuda").name == "cuda:sm_120"
    monkeypatch.setattr(cuda, "cuda_devices", lambda: [CudaDevice(0, "NVIDIA Older", (7, 5), 40, 16 << 30)])
    with pytest.raises(UsageError, match=r"NVIDIA Older is sm_75, older than what llmc compiles for: .*--target cpu"):
        targets.parse("cuda")
    assert tuple(cuda.SHARED_MEMORY) == ARCHITECTURES
    monkeypatch.setattr(cuda, "cuda_devices", list)
    with pytest.raises(UsageError, match=r"no NVIDIA driver answers here: name the architecture .*--target cuda:sm_90a"):
        targets.parse("cuda")


def test_without_a_compiler_the_error_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    with pytest.raises(MissingExtraError, match=r"needs nvcc or NVRTC .*pip install nvidia-cuda-nvrtc==13\.\* nvidia-cuda-runtime"):
        cuda_tools.compiler()


@pytest.mark.parametrize("place", ["cu13/bin/nvcc", "cuda_nvcc/bin/nvcc"])
def test_nvcc_of_the_python_packages_is_found(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no other, and only beside a C++ compiler."""
    nvcc, spec = tmp_path / place, importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.is_relative_to(tmp_path) and is_file(path))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert cuda_tools.find_nvcc() == nvcc and cuda_tools.writes_ptx("sm_80")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert cuda_tools.find_nvcc() is None


def test_nvrtc_makes_machine_code_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is one that the tests install; a C++ compiler, which nvcc would need, is hidden."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    compile_source = cuda_tools.compiler()
    source = (
        "#include <cuda_bf16.h>\n__global__ void twice(nv_bfloat16* x, const __grid_constant__ CUtensorMap m) { *x = *x + *x; }"
    )
    code = compile_source(source, "sm_90a")
    found = struct.unpack_from("<4s14xH", code)
    assert found == (b"\x7fELF", 190)  # EM_CUDA
    assert b"twice" in code and b"__global__" not in code and b".version " not in code
    with pytest.raises(InternalError, match=r"NVRTC refuses the kernels generated for sm_80: .*nonsense"):
        compile_source("__global__ void f() { nonsense; }", "sm_80")


def test_source_that_the_compiler_refuses_is_a_defect_of_ours() -> None:
    with pytest.raises(InternalError, match="refuses the kernels generated for sm_80"):
        cuda_tools.compiler()("__global__ void f() { nonsense; }", "sm_80")


def test_ptx_comes_with_code_that_newer_gpus_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = cuda_tools.find_nvcc()
    if nvcc is None:
        assert targets.parse("cuda:sm_80").features == ()
        return
    assert targets.parse("cuda:sm_80").features == ("ptx",) and targets.parse("cuda:sm_90a").features == ()
    kernel = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] += 1.0f; }'
    monkeypatch.setattr(cuda_tools, "NVCC_FLAGS", (*cuda_tools.NVCC_FLAGS, "--no-compress"))
    assert b".target sm_80" in cuda_tools._run_nvcc(nvcc, kernel, "sm_80")
    assert b".target sm_" not in cuda_tools._run_nvcc(nvcc, kernel, "sm_90a")


def test_a_model_compiled_without_a_gpu(llama_for_three: Path) -> None:
    out, made = llama_for_three, manifest.read(llama_for_three)
    (variant,) = [v for v in made.variants if v.target == "cuda:sm_90a"]
    assert (variant.kind, variant.mcpu, variant.name) == ("cuda", "sm_90a", "cuda-sm_90a")
    library = (out / variant.library).read_bytes()
    # machine code (nvcc's fatbin, or NVRTC's ELF of EM_CUDA), and neither source nor PTX to compile at load
    assert b"\x50\xed\x55\xba" in library or b"\x7fELF\x02\x01\x01\x41" in library
    assert b"__global__" not in library and b".version " not in library and not re.search(rb"\.target sm_", library)
    for other in (v for v in made.variants if v.kind == "cuda"):
        assert b"__global__" not in (out / other.library).read_bytes()
    assert {p.name for p in (out / "runtime").iterdir()} == {"libtvm_runtime.so", "libtvm_runtime_cuda.so"}
    assert made.kv.dtype == "bfloat16"
    assert {t.dtype for t in made.tensors.values()} == {"bfloat16", "float32"}  # float32: rope's frequencies
    dialect = {k.op: k.shape for k in variant.kernels if k.op != "relax"}
    others = {"llmc.sample_stats", "llmc.sample", "llmc.advance", "llmc.row_starts"}  # over float32 logits and integers
    assert dialect.keys() - others == {"llmc.linear", "llmc.attend", "llmc.rope_append", "llmc.rms_norm"}
    assert others <= dialect.keys() and all("bfloat16" in shape for op, shape in dialect.items() if op not in others)
    assert all(k.family.startswith(("cuda.", "gpu.")) for k in variant.kernels if k.op != "relax")
    head = [k for k in variant.kernels if "out_dtype=float32" in k.shape]
    assert {k.function for k in head} == {"decode", "extend"} and sum(k.count for k in head) == 2
