"""Modules whose kernels llmc starts itself: HIP over a library that stands for AMD's, OpenCL over one that is here."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmc
from llmc.compiler import compile as compile_model
from llmc.errors import ArtifactError, InternalError, MissingExtraError, RequestError
from llmc.runtime import device
from llmc.runtime.artifact import open_artifact
from llmc.runtime.device import AmdDevice, amd_devices, opencl_devices
from llmc.runtime.gpu import hip, launch
from llmc.runtime.gpu.device_code import DeviceCode, KernelInfo, parse
from llmc.runtime.gpu.hip import Hip, HipExecutor
from llmc.runtime.gpu.opencl import OpenClExecutor
from llmc.runtime.host import host
from llmc.targets.code_object import find
from llmc.targets.link import host_c_compiler

GFX942 = 0x4C
"""What the flags of its ELF files say."""

PROMPTS = [[3, 5, 7, 9, 11, 13, 2], [4], [20, 6, 8]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library that stands for libamdhip64."""
    out = tmp_path_factory.mktemp("hip") / "libamdhip64.so"
    source = Path(__file__).parent / "fake_hip.c"
    subprocess.run(
        [*host_c_compiler(), "-O1", "-Wall", "-Werror", "-shared", "-fPIC", str(source), "-o", str(out), "-ldl"], check=True
    )
    return ctypes.CDLL(str(out))


@pytest.fixture
def amd(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``amd(memory, arch, kernels)``: this machine has such a GPU from now on."""
    kept: list[Any] = []

    def install(memory: int = 1 << 30, version: int = 90402, flags: int = GFX942, kernels: Any = (None, {})) -> None:
        path, arguments = kernels
        names = (ctypes.c_char_p * max(len(arguments), 1))(*(name.encode() for name in arguments))
        counts = (ctypes.c_int * max(len(arguments), 1))(*(len(types) for types in arguments.values()))
        kept.extend([names, counts])
        where = None if path is None else str(path).encode()
        library.fake_hip_setup(where, names, counts, len(arguments), flags, ctypes.c_size_t(memory))
        for node, gfx in enumerate((0, version)):
            (tmp_path / "nodes" / str(node)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "nodes" / str(node) / "properties").write_text(f"cpu_cores_count 8\ngfx_target_version {gfx}\n")
        monkeypatch.setattr(device, "TOPOLOGY", tmp_path / "nodes")
        monkeypatch.setattr(hip, "LIBRARIES", (library._name,))

    return install


def test_amd_gpus_as_the_kernel_lists_them(amd: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, arch in [(90402, "gfx942"), (90010, "gfx90a"), (110000, "gfx1100"), (120001, "gfx1201")]:
        amd(version=version)
        assert amd_devices() == [AmdDevice(0, arch)]
    monkeypatch.setattr(device, "TOPOLOGY", tmp_path / "none")
    assert amd_devices() == []


def test_without_a_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hip, "LIBRARIES", ("libnone.so",))
    with pytest.raises(MissingExtraError, match=r"needs libnone.so, and it is not installed here: install ROCm"):
        Hip(0)
    monkeypatch.setattr(device, "OPENCL_LIBRARY", "libnone.so")
    assert opencl_devices() == []
    with pytest.raises(MissingExtraError, match="running on OpenCL needs libOpenCL"):
        OpenClExecutor.open_driver(0)


def test_what_hip_refuses_is_one_sentence(amd: Callable[..., None]) -> None:
    amd(memory=1000)
    with pytest.raises(ArtifactError, match=r"the GPU 1 cannot be used .*no ROCm-capable device.*rocm-smi"):
        Hip(1)
    driver = Hip(0)
    with pytest.raises(InternalError, match="hipMalloc: out of memory"):
        driver.allocate(4096)
    elf = bytearray(64)
    elf[:4], elf[48:52] = b"\x7fELF", struct.pack("<I", 0x41)
    with pytest.raises(ArtifactError, match=r"does not take the model's code object \(hipModuleLoadData: no kernel image"):
        driver.load_code(DeviceCode("hsaco", (), bytes(elf)))
    elf[48:52] = struct.pack("<I", GFX942)
    with pytest.raises(InternalError, match="hipModuleGetFunction: named symbol not found"):
        driver.load_code(DeviceCode("hsaco", (KernelInfo("absent", (), ()),), bytes(elf)))
    driver.close()


def test_memory_comes_back(amd: Callable[..., None]) -> None:
    amd(memory=1 << 20)
    driver = Hip(0)
    before = driver.memory()
    first = driver.allocate(1000, zero=True)
    places = driver.allocate_all([256, 512, 256])
    assert [b - places[0] for b in places] == [0, 256, 768]
    host_side = driver.pinned(1000)
    driver.copy_out(host_side, first)
    driver.synchronize()
    assert not host_side.any()
    driver.close()
    assert Hip(0).memory() == before


def _stored(form: bytes, code: bytes) -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    types = struct.pack("<Q", 3) + b"\x03\x40\x01\x00" + b"\x02\x20\x01\x00" + b"\x00\x20\x01\x00"
    tags = [b"blockIdx.x", b"threadIdx.x", b"tirx.use_dyn_shared_memory"]
    kernel = (
        text(b"k") + text(b"k") + types + struct.pack("<Q", len(tags)) + b"".join(map(text, tags)) + struct.pack("<Q2i", 2, 0, 0)
    )
    return text(form) + struct.pack("<Q", 1) + kernel + text(code)


def test_device_code_is_read_as_tvm_stores_it() -> None:
    code = parse(_stored(b"cl", b"__kernel void k() {}"))
    assert code.form == "cl" and code.code == b"__kernel void k() {}"
    (kernel,) = code.kernels
    assert kernel.types == ((3, 64), (2, 32), (0, 32))
    assert kernel.sizes([7, 64, 1024]) == ([7, 1, 1], [64, 1, 1], 1024)
    with pytest.raises(ArtifactError, match="the device code of the compiled module is damaged"):
        parse(_stored(b"cl", b"0123456789")[:-4])


def test_a_launch_gets_its_arguments_as_the_kernel_declares_them() -> None:
    info = KernelInfo("k", ((3, 64), (2, 32), (0, 32)), ("blockIdx.y", "threadIdx.x"))
    seen: list[Any] = []
    call = launch._launcher(info, lambda *arguments: seen.append(arguments))
    values = [0x7F0012345678, struct.unpack("<Q", struct.pack("<d", 0.1))[0], -3 & (1 << 64) - 1, 5, 64]
    raw = (ctypes.c_uint64 * 10)(*(v for value in values for v in (1, value)))
    call(ctypes.addressof(raw), 5, 0)
    ((arguments, grid, block, shared),) = seen
    assert arguments == [values[0], struct.unpack("<I", struct.pack("<f", 0.1))[0], values[2]]
    assert (grid, block, shared) == ([1, 5, 1], [64, 1, 1], 0)
    raw[7] = 0  # an empty grid starts nothing
    call(ctypes.addressof(raw), 5, 0)
    assert len(seen) == 1


def test_a_workspace_is_the_same_memory_in_every_call() -> None:
    taken: list[int] = []

    def allocate(nbytes: int) -> int:
        taken.append(nbytes)
        return 1000 * len(taken)

    workspace = launch.Workspace(SimpleNamespace(allocate=allocate))  # type: ignore[arg-type]
    for _ in range(3):
        workspace.begin()
        assert [workspace.storage(n) for n in (8, 16, 8)] == [1000, 2000, 3000]
    first = workspace.allocate(8)
    workspace.free(first)
    assert workspace.allocate(8) == first and taken == [8, 16, 8, 8]


def generated(folder: Path) -> list[list[int]]:
    with llmc.load(folder) as model:
        alone = [model.generate(p, max_tokens=6).token_ids for p in PROMPTS]
        together = [c.token_ids for c in model.generate(PROMPTS, max_tokens=6)]
        assert together == alone
        return together


# Slow: every thread of every kernel of a whole model is emulated.
@pytest.mark.slow
def test_a_model_through_hip(
    amd: Callable[..., None],
    library: ctypes.CDLL,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Load, prefill, decode and graphs, through the library that stands for HIP: the tokens of the CPU's variant."""
    from tvm import tirx

    from llmc.targets import rocm
    from tests.support import cuda_emulator

    built: list[Any] = []
    build = rocm.build
    monkeypatch.setattr(rocm, "build", lambda module, target: built.append((module, target)) or build(module, target))
    folder = tmp_path / "artifact"
    compile_model(str(tiny_model_dir("llama")), out=folder, target=["cpu", "rocm:gfx942"], dtype="float32", context=64)
    expected = generated(folder)
    ((module, target),) = built
    functions = {
        str(v.name_hint): f for v, f in module.functions.items() if isinstance(f, tirx.PrimFunc) and "shape_func" not in str(v)
    }
    plain = {name: f.without_attr("target") for name, f in functions.items()}
    kernels = cuda_emulator.library(plain, target)
    amd(kernels=kernels)
    opened = open_artifact(folder)
    assert opened.variant.target == "rocm:gfx942" and opened.why.startswith("rocm:gfx942 suits AMD GPU 0 best; rather than cpu:")
    (code,) = find((folder / opened.variant.library).read_bytes())
    assert all(name.encode() in code for name in kernels[1])  # what is emulated is what was compiled
    assert generated(folder) == expected
    replays = ctypes.c_long.in_dll(library, "fake_hip_replays").value
    assert replays >= 3 and ctypes.c_long.in_dll(library, "fake_hip_launches").value > 100
    needed = HipExecutor.available_memory(opened)
    amd(memory=(1 << 30) - needed - 1000, kernels=kernels)
    with pytest.raises(RequestError, match=r"the GPU lacks .* for this model and one page"):
        llmc.load(folder)
    amd(version=110000, kernels=kernels)
    assert open_artifact(folder).variant.kind == "cpu"


@pytest.mark.peer
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
def test_a_model_through_opencl(model_type: str, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """On an OpenCL device of this machine, PoCL for one: the tokens of the CPU's variant, and all memory back."""
    folder = tmp_path / "artifact"
    compile_model(str(tiny_model_dir(model_type)), out=folder, target=["cpu", "opencl:generic"], dtype="float32", context=64)
    expected = generated(folder)
    opened = open_artifact(folder)
    (cpu, other) = opened.manifest.variants
    assert opened.variant.kind == "cpu" and "rather than opencl:generic, which would run too" in opened.why
    executor = OpenClExecutor(replace(opened, variant=other), 24)
    from llmc.runtime.model import Model

    with Model(opened.manifest, executor, folder) as model:
        assert [model.generate(p, max_tokens=6).token_ids for p in PROMPTS] == expected
        assert [c.token_ids for c in model.generate(PROMPTS, max_tokens=6)] == expected
        timer = executor.start_timer()
        model.generate(PROMPTS[0], max_tokens=2)
        assert 0 < timer.seconds() < 60
    assert executor.driver._allocations == {}
    assert host().machine in cpu.triple and re.match(r"opencl:", other.target)
