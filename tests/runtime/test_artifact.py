"""An artifact that cannot run here is refused before anything is loaded, with the reason and the remedy."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmc.errors import ArtifactError, MissingExtraError, RequestError
from llmc.manifest import FileInfo, FunctionInfo, Limits, TensorInfo, Variant
from llmc.runtime import host as host_module
from llmc.runtime import library, load, tile_registers
from llmc.runtime.artifact import check_sizes, check_versions, choose_variant, open_artifact, refusal
from llmc.runtime.device import AmdDevice, CudaDevice, MetalDevice, OpenClDevice
from llmc.runtime.footprint import Footprint, footprint, workspace_bytes
from llmc.runtime.host import Host, describe, parse_cpuinfo
from llmc.runtime.loading import Memory, fitted, kv_page_count

from .toy import PAGE_SIZE, manifest

ZEN = Host("x86_64", "linux", "AMD EPYC", frozenset({"avx2", "fma", "avx512f"}), (0, 1), 2)
PI = Host("aarch64", "linux", "Cortex-A76", frozenset({"asimd", "asimddp"}), (0, 1, 2, 3), 4)
MAC = Host("aarch64", "darwin", "Apple M4", None, (0,), 1)


def variant(name: str, triple: str, *features: str, kind: str = "cpu") -> Variant:
    return Variant(name, f"{kind}:{name}", kind, triple, name, list(features), f"variants/{name}/lib.so", [], [], [])


V3 = variant("x86-64-v3", "x86_64-unknown-linux-gnu", "avx2", "fma")
TILES = variant("sapphirerapids", "x86_64-unknown-linux-gnu", "avx2", "fma", "avx512f", "amx_int8")
V4 = variant("x86-64-v4", "x86_64-unknown-linux-gnu", "avx2", "fma", "avx512f")
ARM = variant("neon", "aarch64-linux-gnu", "asimd")
APPLE = variant("apple", "arm64-apple-macos13.0")
CUDA = variant("sm_90", "x86_64-unknown-linux-gnu", kind="cuda")


@pytest.mark.parametrize(
    ("machine", "variants", "want"),
    [
        (ZEN, [V3, V4, ARM, CUDA], V4),
        (replace(ZEN, features=frozenset({"avx2", "fma"})), [V4, V3], V3),
        (ZEN, [V3, TILES, V4], V4),
        (replace(ZEN, features=ZEN.features | {"amx_int8"}), [V3, TILES, V4], TILES),
        (PI, [V4, ARM], ARM),
        (MAC, [ARM, APPLE], APPLE),
    ],
)
def test_the_variant_that_uses_most_of_the_machine(machine: Host, variants: list[Variant], want: Variant) -> None:
    m = replace(manifest(5, 8, Limits(1, 1, 1)), variants=variants)
    assert choose_variant(m, Path("a"), machine)[0] is want


@pytest.mark.parametrize(
    ("v", "machine", "message"),
    [
        (
            V4,
            replace(ZEN, features=frozenset({"avx2", "fma"})),
            "cpu:x86-64-v4 needs the CPU features avx512f, which this AMD EPYC",
        ),
        (TILES, ZEN, "cpu:sapphirerapids needs the CPU features amx_int8, which this AMD EPYC"),
        (TILES, replace(ZEN, withheld="Linux does not allow it"), "needs the CPU features amx_int8: Linux does not allow it"),
        (ARM, ZEN, "cpu:neon is for aarch64-linux-gnu, and this machine is x86_64 linux"),
        (APPLE, PI, "is for arm64-apple-macos13.0, and this machine is aarch64 linux"),
        (CUDA, ZEN, "cuda:sm_90 needs an NVIDIA GPU, and no NVIDIA driver answers"),
        (replace(CUDA, kind="vulkan"), ZEN, "needs a vulkan device, and this runtime drives CPUs, NVIDIA, AMD, Apple and OpenCL"),
        (replace(CUDA, kind="metal"), ZEN, "needs a Mac with an Apple processor, and this machine is none"),
        (replace(CUDA, kind="rocm"), ZEN, "needs an AMD GPU, and the amdgpu driver lists none on this machine"),
        (replace(CUDA, kind="opencl"), ZEN, "needs an OpenCL device with shared virtual memory, and there is none"),
    ],
)
def test_what_cannot_run_says_why_and_what_to_do(v: Variant, machine: Host, message: str) -> None:
    assert message in str(refusal(v, machine))
    m = replace(manifest(5, 8, Limits(1, 1, 1)), variants=[v])
    with pytest.raises(ArtifactError, match="no variant of the artifact") as caught:
        choose_variant(m, Path("a"), machine)
    assert message in str(caught.value)
    assert "add one with `llmc add a --target cpu`" in str(caught.value)


def gpu(major: int, minor: int) -> CudaDevice:
    return CudaDevice(0, "NVIDIA Test", (major, minor), 132, 80 << 30)


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("sm_90a", (8, 9), False),
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_120", (12, 1), True),
    ],
)
def test_machine_code_runs_on_its_own_major_version(arch: str, capability: tuple[int, int], runs: bool) -> None:
    v = variant(arch, "x86_64-linux-gnu", kind="cuda")
    why = refusal(v, ZEN, [gpu(*capability)])
    assert (why is None) == runs
    if not runs:
        m = replace(manifest(5, 8, Limits(1, 1, 1)), variants=[v])
        with pytest.raises(ArtifactError, match=rf"NVIDIA Test is sm_.*--target cuda:{gpu(*capability).arch}`"):
            choose_variant(m, Path("a"), ZEN, [gpu(*capability)])


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_80", (12, 0), True),
        ("sm_80", (9, 0), True),
        ("sm_90", (8, 9), False),
        ("sm_90a", (10, 0), False),
        ("sm_89", (8, 6), False),
    ],
)
def test_newer_gpus_run_from_ptx_where_there_is_some(arch: str, capability: tuple[int, int], runs: bool) -> None:
    v = replace(variant(arch, CUDA.triple, kind="cuda"), features=["ptx"])
    assert (refusal(v, ZEN, [gpu(*capability)]) is None) == runs
    own = variant(f"sm_{capability[0]}{capability[1]}", CUDA.triple, kind="cuda")
    m = replace(manifest(5, 8, Limits(1, 1, 1)), variants=[v])
    if runs:
        best, why = choose_variant(m, Path("a"), ZEN, [gpu(*capability)])
        assert best is v and "from PTX, which the driver translates for NVIDIA Test" in why
        best, why = choose_variant(replace(m, variants=[v, own]), Path("a"), ZEN, [gpu(*capability)])
        assert best is own and "PTX" not in why


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((7, 5), None), ((8, 0), "sm_80"), ((8, 8), "sm_87"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"), ((11, 0), "sm_103"),
     ((12, 0), "sm_120"), ((12, 1), "sm_120")],
)  # fmt: skip
def test_what_to_compile_for_a_gpu(capability: tuple[int, int], arch: str | None) -> None:
    """Its own architecture or one whose code it runs; the command of the refusal has it, too."""
    device = gpu(*capability)
    assert device.compiled_for == arch
    m = replace(manifest(5, 8, Limits(1, 1, 1)), variants=[ARM])
    with pytest.raises(ArtifactError, match=rf"--target {f'cuda:{arch}' if arch else 'cpu'}`"):
        choose_variant(m, Path("a"), ZEN, [device])


def test_of_ptx_that_of_the_newest_architecture_is_taken() -> None:
    old, new = (replace(variant(arch, CUDA.triple, kind="cuda"), features=["ptx"]) for arch in ("sm_90", "sm_100"))
    m = replace(manifest(5, 8, Limits(1, 1, 1)), variants=[old, new])
    assert choose_variant(m, Path("a"), ZEN, [gpu(12, 0)])[0] is new


def test_a_gpu_is_preferred_to_the_processor() -> None:
    m = replace(manifest(5, 8, Limits(1, 1, 1)), variants=[V4, CUDA, variant("sm_90a", CUDA.triple, kind="cuda")])
    assert choose_variant(m, Path("a"), ZEN, [gpu(9, 0)])[0].mcpu == "sm_90a"
    assert choose_variant(m, Path("a"), ZEN, [])[0] is V4


@pytest.mark.parametrize(("name", "family"), [("Apple M1", 7), ("Apple M2 Pro", 8), ("Apple M3", 9), ("Apple M5 Max", 9)])
def test_an_apple_gpu_runs_what_was_compiled_for_its_family_or_an_older_one(name: str, family: int) -> None:
    mac = MetalDevice(name)
    for asked in (7, 8, 9):
        v = replace(APPLE, kind="metal", mcpu=f"apple{asked}", target=f"metal:apple{asked}")
        assert (refusal(v, MAC, [mac]) is None) == (asked <= family)
    assert (
        choose_variant(replace(manifest(5, 8, Limits(1, 1, 1)), variants=[APPLE, v]), Path("a"), MAC, [MetalDevice("Apple M3")])[0]
        is v
    )


def test_the_choice_is_explained() -> None:
    mi300 = variant("gfx942", CUDA.triple, kind="rocm")
    opencl = variant("generic", CUDA.triple, kind="opencl")
    m = replace(manifest(5, 8, Limits(1, 1, 1)), variants=[V4, opencl, mi300])
    gpu, other = OpenClDevice(1, "Test GPU", True, 1 << 30), OpenClDevice(2, "Test processor", False, 1 << 30)

    def chosen(*gpus: Any) -> tuple[str, str]:
        best, why = choose_variant(m, Path("a"), ZEN, gpus)
        return best.kind, why

    assert chosen(gpu, AmdDevice(0, "gfx942")) == (
        "rocm",
        "rocm:gfx942 suits AMD GPU 0 best; rather than opencl:generic, which would run too; rather than cpu:x86-64-v4, which would "
        "run too",
    )
    assert chosen(gpu)[0] == "opencl"
    kind, why = chosen(other, AmdDevice(0, "gfx1100"))
    assert kind == "cpu" and "machine code for gfx942, and this machine's AMD GPU 0 is gfx1100" in why
    assert choose_variant(replace(m, variants=[V4]), Path("a"), ZEN)[1] == "cpu:x86-64-v4 is the only variant"
    with pytest.raises(ArtifactError, match=r"`llmc add a --target rocm:gfx1100`"):
        choose_variant(replace(m, variants=[mi300]), Path("a"), ZEN, [AmdDevice(0, "gfx1100")])


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def test_the_command_that_makes_an_artifact_anew() -> None:
    """With its targets, types and limits; what is usual is left out."""
    m = replace(manifest(5, 8, Limits(4, 1, 1)), variants=[V3, CUDA], options={"dtype": "bfloat16", "kv_dtype": "bfloat16"})
    with pytest.raises(ArtifactError) as caught:
        check_sizes(replace(m, files={"lib.so": FileInfo(5, "")}), Path("my model.llmc"))
    command = rf"llmc compile {m.model.source} -o 'my model.llmc' --force --target {V3.target} --target {CUDA.target}"
    assert f"{command} --dtype bfloat16 --max-batch 4`" in str(caught.value)
    options = {"dtype": "float16", "kv_dtype": "int8", "quant": "int4_g64", "method": "awq", "keep": ["lm_head=int8"]}
    with pytest.raises(ArtifactError) as caught:
        check_sizes(replace(m, options=options, files={"lib.so": FileInfo(5, "")}), Path("a"))
    words = " --dtype float16 --kv-dtype int8 --quant int4_g64 --method awq --keep lm_head=int8 --max-batch 4`"
    assert words in str(caught.value)


def test_the_whole_artifact_opens(artifact: Path) -> None:
    opened = open_artifact(artifact)
    assert opened.folder == artifact
    assert opened.variant.name == "cpu"


def test_versions_must_match(artifact: Path) -> None:
    change(artifact, lambda raw: raw.update(llmc="9.3.1"))
    command = r"`llmc compile hand/made -o .* --force --target cpu:here .*`"
    with pytest.raises(ArtifactError, match=rf"built by llmc 9\.3\.1 and this is llmc .*{command}.*pip install llmc==9"):
        load(artifact)
    change(artifact, lambda raw: raw.update(llmc="0.1.99", tvm="0.26.0"))
    with pytest.raises(ArtifactError, match=r"built with TVM 0\.26\.0 and TVM 0\.27\.0\S* is installed"):
        load(artifact)
    # a runtime library of its own needs no TVM installed
    (artifact / "runtime").mkdir()
    (artifact / "runtime" / library.LIBRARY_NAME).write_bytes(b"")
    check_versions(open_artifact(artifact).manifest, artifact)
    change(artifact, lambda raw: raw.update(format=99))
    with pytest.raises(ArtifactError, match="manifest format 99"):
        load(artifact)


def test_damage_is_found_before_loading(artifact: Path) -> None:
    weights = artifact / "weights" / "weights-00001.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    with pytest.raises(
        ArtifactError, match=rf"weights-00001\.safetensors has {len(data) - 1} bytes, and the manifest says {len(data)}"
    ):
        load(artifact)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"weights-00001\.safetensors is missing"):
        load(artifact)
    (artifact / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        load(artifact)
    with pytest.raises(ArtifactError, match="no such folder"):
        load(artifact / "none")


CPUINFO = """processor\t: 0
model name\t: Some CPU @ 3GHz
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 fma

processor\t: 1
model name\t: Some CPU @ 3GHz
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 fma

processor\t: 2
model name\t: Some CPU @ 3GHz
physical id\t: 0
core id\t\t: 1
flags\t\t: fpu avx2 fma
"""
ARM_CPUINFO = "processor\t: 0\nFeatures\t: fp asimd\n\nprocessor\t: 1\nFeatures\t: fp asimd\n\nHardware\t: Board\n"


def test_host_from_cpuinfo() -> None:
    machine = describe(CPUINFO, "AMD64", "linux", (0, 1, 2))
    assert (machine.machine, machine.cpu_name, machine.cores) == ("x86_64", "Some CPU @ 3GHz", 2)
    assert machine.features == {"fpu", "avx2", "fma"}
    assert describe(CPUINFO, "x86_64", "linux", (0, 1)).cores == 1
    board = describe(ARM_CPUINFO, "arm64", "linux", (0, 1))
    assert (board.machine, board.cores, board.features) == ("aarch64", 2, {"fp", "asimd"})
    elsewhere = describe("", "arm64", "darwin", (0, 1, 2))
    assert (elsewhere.features, elsewhere.cores) == (None, 3)
    assert len(parse_cpuinfo(CPUINFO)) == 3


def test_tile_registers_are_asked_for_once_and_left_out_where_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [errno.EOPNOTSUPP, 0]
    asked: list[list[int]] = []

    def syscall(*numbers: Any) -> int:
        asked.append([n.value for n in numbers])
        ctypes.set_errno(answers[0])
        return -1 if answers.pop(0) else 0

    monkeypatch.setattr(tile_registers.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syscall=syscall))
    monkeypatch.setattr(tile_registers.sys, "platform", "linux")
    monkeypatch.setattr(tile_registers.platform, "machine", lambda: "x86_64")
    plain, full = frozenset({"avx2"}), frozenset({"avx2", "amx_tile", "amx_int8"})
    tile_registers.refusal.cache_clear()
    try:
        assert tile_registers.usable(plain) == plain and not asked
        assert tile_registers.usable(full) == tile_registers.usable(full) == plain
        assert asked == [[158, 0x1023, 18]]  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
        assert tile_registers.refusal() == "Linux does not let this process use tile registers (Operation not supported)"
        tile_registers.refusal.cache_clear()
        assert tile_registers.usable(full) == full and len(asked) == 2
        tile_registers.refusal.cache_clear()
        monkeypatch.setattr(tile_registers.platform, "machine", lambda: "aarch64")
        assert "not on linux for aarch64" in str(tile_registers.refusal())
    finally:
        tile_registers.refusal.cache_clear()


def test_this_machine() -> None:
    machine, memory = host_module.host(), host_module.memory()
    assert machine.machine == os.uname().machine
    assert 1 <= machine.cores <= len(machine.cpus) <= (os.cpu_count() or 1)
    assert 0 < memory.available <= memory.total


def test_default_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    assert host_module.default_threads() == host_module.host().cores
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    assert host_module.default_threads() == 1
    monkeypatch.setenv("TVM_NUM_THREADS", "4096")
    assert host_module.default_threads() == len(host_module.host().cpus)


def test_the_runtime_library_is_found_without_importing_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.installed_library()
    assert path is not None
    assert path.name == library.LIBRARY_NAME
    monkeypatch.delitem(sys.modules, "tvm", raising=False)
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setattr(library, "installed_library", lambda _: None)
    with pytest.raises(MissingExtraError, match="pip install apache-tvm=="):
        library.load_runtime(Path("nowhere"))


def test_page_count_follows_context_batch_and_memory() -> None:
    m = manifest(5, 1024, Limits(8, 8, 8))
    page = m.kv.bytes_per_token * PAGE_SIZE
    huge, none = Memory(10**12), Memory(0)
    assert kv_page_count(m, 1024, 8, None, huge) == 2 * 256
    assert kv_page_count(m, 1024, 1, None, huge) == 256
    assert kv_page_count(m, 1021, 1, None, huge) == 256
    assert kv_page_count(m, 1024, 8, 10**12, none) == 8 * 256
    assert kv_page_count(m, 1024, 8, 10 * page + 1, huge) == 10
    assert kv_page_count(m, 1024, 8, None, Memory(40 * page)) == 20


def test_a_gpus_memory_is_for_pages_alone_and_too_little_of_it_is_refused() -> None:
    m = manifest(5, 1024, Limits(8, 8, 8))
    page = m.kv.bytes_per_token * PAGE_SIZE
    assert kv_page_count(m, 1024, 8, None, Memory(10**12, exclusive=True)) == 8 * 256
    assert kv_page_count(m, 1024, 8, None, Memory(41 * page - 1, exclusive=True)) == 40
    with pytest.raises(RequestError, match=f"the GPU lacks {page + 5} bytes for this model"):
        kv_page_count(m, 1024, 8, None, Memory(-5, exclusive=True))


def test_limits_that_were_left_open_shrink_to_the_memory_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    m = manifest(5, 1024, Limits(8, 8, 8))
    assert fitted(m, 256, None, None) == (1024, 8)
    assert not caplog.messages
    assert fitted(m, 5, None, None) == (5 * PAGE_SIZE, 5)
    assert [text.split(":")[0] for text in caplog.messages] == [
        f"the free memory holds a context of {5 * PAGE_SIZE} tokens, not the 1024 of the artifact",
        "the free memory holds 5 sequences at once, not 8",
    ]
    caplog.clear()
    assert fitted(m, 5, 512, 8) == (512, 8)
    assert not caplog.messages


def test_the_footprint_is_what_every_function_needs_of_each_size() -> None:
    m = manifest(1000, 64, Limits(4, 16, 8))
    functions = [FunctionInfo("decode", 0, 1, [4096, 4096, 100]), FunctionInfo("extend", 0, 1, [5000, 4000, 3 << 20])]
    m.tensors = {"w": TensorInfo("f", "bfloat16", [3, 5], "bfloat16", "bfloat16")}
    cpu = Variant("cpu", "cpu", "cpu", "", "", [], "", functions, ["w"], [])
    gpu = replace(cpu, kind="cuda")
    assert workspace_bytes(cpu) == 3 * 4096 + 8192 + (3 << 20)
    assert workspace_bytes(gpu) == 3 * 4096 + 8192 + (4 << 20)
    arguments = sum(-(-4 * n // 256) * 256 for n in (16, 16, 16, 5, 4, 8, 48, 4, 4 * 64 // PAGE_SIZE))
    assert footprint(m, cpu) == Footprint(256, workspace_bytes(cpu), 4 * 8 * 1000 + arguments)
    assert footprint(m, gpu).buffers == 4 * 8 * 1000 + arguments + 2 * 4 * 1000
