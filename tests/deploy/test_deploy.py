"""An artifact that grows a variant, and what is deployed of it: each is run, from Python and from C."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import llmc
from llmc import add_variant, deploy, manifest
from llmc.artifact import hash_file
from llmc.compiler import compile as compile_model
from llmc.deploy import PackageReport, package
from llmc.deploy.programs import build_command, dockerfile
from llmc.errors import ArtifactError, OutputError, UsageError
from llmc.progress import SilentProgress
from llmc.runtime import tile_registers
from llmc.runtime.platforms import platform_of
from llmc.runtime.weights import stored_weights
from llmc.targets.link import host_c_compiler
from llmc.verify import verify_files
from llmc.wheels import runtime_files
from tests.support import example

OPTIONS = {"dtype": "bfloat16", "context": 64}
CPU, OTHER = "cpu:x86-64-v3", "opencl:generic"
PROMPT = [3, 5, 7, 9, 11, 13, 2]


@pytest.fixture(scope="module")
def folder(llama_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for a CPU, to which a variant for OpenCL was added."""
    out = tmp_path_factory.mktemp("deploy") / "artifact"
    shutil.copytree(llama_artifact, out)
    llmc.add(out, target=OTHER)
    return out


@pytest.fixture(scope="module")
def packaged(folder: Path) -> PackageReport:
    return package(folder, target="cpu", out=folder.parent / "package")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    with llmc.load(folder) as model:
        return list(model.generate(PROMPT, max_tokens=12).token_ids)


def test_an_added_variant_shares_weights_and_leaves_the_first_as_it_was(folder: Path, llama_artifact: Path) -> None:
    m, before = manifest.read(folder), manifest.read(llama_artifact)
    assert [v.target for v in m.variants] == [CPU, OTHER]
    kept = {name: info for name, info in before.files.items() if name.split("/")[0] in ("variants", "weights", "tokenizer")}
    assert len(kept) >= 3 and {name: m.files[name] for name in kept} == kept
    matrices = [name for name, t in m.tensors.items() if len(t.shape) == 2]
    assert sorted(matrices) == sorted(name for name, t in before.tensors.items() if len(t.shape) == 2)
    assert {m.tensors[name].file for name in m.variants[1].weights} == {f"weights/weights-0000{n}.safetensors" for n in (1, 2)}
    assert not verify_files(folder, SilentProgress()).problems
    assert sorted(p.name for p in folder.parent.iterdir() if p.name.startswith(".")) == []


def test_what_cannot_be_added(folder: Path, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has a variant for opencl:generic already: name another --target"):
        llmc.add(folder, target=OTHER)
    with pytest.raises(ArtifactError, match=r"was not compiled from .*gpt2.* as it is now"):
        llmc.add(folder, target="cpu:x86-64-v2", model=str(tiny_model_dir("gpt2")))
    with pytest.raises(ArtifactError, match="is not an llmc artifact"):
        llmc.add(tmp_path, target=CPU)


def test_an_interrupted_add_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = {p: hash_file(p) for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(add_variant, "build_variants", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llmc.add(folder, target="cpu:x86-64-v2")
    assert {p: hash_file(p) for p in folder.rglob("*") if p.is_file()} == before
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_the_bill_of_materials_names_parts_and_licences(folder: Path) -> None:
    bill = json.loads((folder / "sbom.cdx.json").read_text(encoding="utf-8"))
    parts = {c["name"]: c for c in bill["components"]}
    m = manifest.read(folder)
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["version"] == m.model.fingerprint[:16]
    for variant in m.variants:
        assert parts[variant.library]["hashes"] == [{"alg": "SHA-256", "content": m.files[variant.library].sha256}]
    licences = {name: [next(iter(entry.values())) for entry in part.get("licenses", [])] for name, part in parts.items()}
    assert licences["runtime/libtvm_runtime.so"] == [{"id": "Apache-2.0"}]
    assert all(licences[name] for name in ("apache-tvm-ffi", "numpy", "tokenizers", "jinja2"))
    assert "timestamp" not in bill["metadata"]


@pytest.mark.parametrize("memory", ["", "-DCOPY_ALWAYS"], ids=["shared", "copied"])
def test_the_package_runs_from_c(memory: str, packaged: PackageReport, expected: list[int]) -> None:
    """Built as the file says; once more as on a device whose memory is not the program's."""
    flags = ["-Wall", "-Wextra", "-Werror", *filter(None, [memory])]
    example.build(packaged.out, [*host_c_compiler(), *flags])

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(packaged.out / "example"), *map(str, arguments)]
        return subprocess.run(command, cwd=packaged.out, capture_output=True, text=True, check=False, timeout=60)

    done = run(12, *PROMPT)
    assert done.returncode == 0, done.stderr
    assert [int(t) for t in done.stdout.split()] == expected
    for arguments, words in [
        ((60, *PROMPT), "67 tokens are more than the context of 64"),
        ((4, 5000), "token 5000 is not in the vocabulary"),
        ((4,), "usage: example COUNT ID..."),
    ]:
        done = run(*arguments)
        assert done.returncode == 1 and words in done.stderr
    index = packaged.out / "model.txt"
    text = index.read_text(encoding="utf-8")
    try:
        index.write_text(text.replace("device 1 tiles 0", "device 1 tiles 1"), encoding="utf-8")
        done = run(12, *PROMPT)
    finally:
        index.write_text(text, encoding="utf-8")
    allowed = tile_registers.refusal() is None
    assert allowed == (done.returncode == 0) and allowed != ("this machine has no AMX" in done.stderr)


def test_the_package_runs_from_python(packaged: PackageReport, folder: Path) -> None:
    program = [sys.executable, "run.py", "--max-tokens", "8", "ab ab"]
    done = subprocess.run(program, cwd=packaged.out, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    with llmc.load(folder) as model:
        assert done.stdout.rstrip("\n") == model.generate("ab ab", max_tokens=8).text.rstrip("\n")
    shown = "import sys; sys.path.insert(0, 'python'); import llmc.runtime.loading as m; print(m.__file__)"
    done = subprocess.run([sys.executable, "-c", shown], cwd=packaged.out, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(packaged.out / "python"))


def test_the_package_is_small_and_whole(packaged: PackageReport) -> None:
    assert packaged.runtime < 20e6
    assert packaged.total == sum(p.stat().st_size for p in packaged.out.rglob("*") if p.is_file() and p.name != "example")
    m = manifest.read(packaged.out / "model")
    assert [v.target for v in m.variants] == [CPU] and set(m.tensors) == set(m.variants[0].weights)
    assert not verify_files(packaged.out / "model", SilentProgress()).problems


def test_a_package_has_the_weights_of_its_variant_alone(folder: Path, tmp_path: Path) -> None:
    report = package(folder, target=OTHER, out=tmp_path / "package")
    whole, part = manifest.read(folder), manifest.read(report.out / "model")
    assert set(part.tensors) == set(whole.variants[1].weights) < set(whole.tensors)
    assert report.weights < sum(p.stat().st_size for p in (folder / "weights").iterdir())
    assert not (report.out / "example.c").exists()
    assert "ocl-icd-libopencl1 $DRIVER" in (report.out / "Dockerfile").read_text(encoding="utf-8")
    names = whole.variants[1].weights
    for one, other in zip(
        stored_weights(folder, whole.tensors, names), stored_weights(report.out / "model", part.tensors, names), strict=True
    ):
        assert one.dtype == other.dtype and (one.array == other.array).all()


def test_a_target_may_be_spelled_another_way(folder: Path) -> None:
    whole = manifest.read(folder)
    arm = replace(whole.variants[0], target="cpu:aarch64+dotprod+neon")
    m = replace(whole, variants=[*whole.variants, arm])
    assert deploy._variant(m, folder, "cpu:aarch64+dotprod") is arm
    with pytest.raises(UsageError, match="has 2 variants for cpu: choose from"):
        deploy._variant(m, folder, "cpu")
    with pytest.raises(UsageError, match="unknown feature 'dotprd'"):
        deploy._variant(m, folder, "cpu:aarch64+dotprd")


def test_what_cannot_be_packaged(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=r"has no variant for cuda: choose from cpu:x86-64-v3, opencl:generic, or make one with `llmc add"
    ):
        package(folder, target="cuda", out=tmp_path / "package")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(OutputError, match="which llmc will not touch"):
        package(folder, target="cpu", out=tmp_path / "mine", force=True)
    with pytest.raises(OutputError, match="publishes no runtime libraries for aarch64-linux-android"):
        runtime_files("cpu", "aarch64-linux-android", "0.27.0")
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        OutputError, match=r"pip cannot fetch apache-tvm==0.27.0.post1 for linux-aarch64 \(ERROR: .*\): check the network"
    ):
        runtime_files("cpu", "aarch64-linux-gnu", "0.27.0.post1")
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize(
    ("kind", "triple", "words"),
    [
        ("cpu", "x86_64-linux-gnu", ["FROM python:3.12-slim\n", "docker run --rm model"]),
        ("cpu", "aarch64-linux-gnu", ["FROM --platform=linux/arm64 python"]),
        ("cpu", "x86_64-pc-windows-gnu", ["FROM python:3.12-windowsservercore"]),
        ("cuda", "x86_64-linux-gnu", ["--rm --gpus all model", "FROM python"]),
        ("rocm", "x86_64-linux-gnu", ["--device /dev/kfd --device /dev/dri model", "FROM rocm/"]),
        ("opencl", "x86_64-linux-gnu", ["ARG DRIVER="]),
    ],
)
def test_containers(kind: str, triple: str, words: list[str]) -> None:
    platform = platform_of(triple)
    assert platform is not None
    text = dockerfile(kind, platform)
    assert text is not None and all(word in text for word in [*words, "COPY model model", "ENTRYPOINT"])


def test_there_is_no_container_for_macos_and_its_example_is_linked_to_metal() -> None:
    mac = platform_of("arm64-apple-macos13.0")
    assert mac is not None and dockerfile("metal", mac) is None and dockerfile("cpu", mac) is None
    assert "-ltvm_runtime -ltvm_runtime_metal -ltvm_ffi -Wl,-rpath,@loader_path" in build_command("metal", mac)


# Slow: downloads wheels for two systems; ziglang builds their C runtimes.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "zig", "head"),
    [("metal:apple8", "aarch64-macos.13.0", b"\xcf\xfa\xed\xfe"), ("cpu:x86-64-v3@windows", "x86_64-windows-gnu", b"MZ")],
)
def test_examples_of_other_systems_can_be_built(
    target: str, zig: str, head: bytes, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    compile_model(str(tiny_model_dir("llama")), out=tmp_path / "artifact", target=target, **OPTIONS)
    report = package(tmp_path / "artifact", target=target, out=tmp_path / "package")
    example.build(report.out, [sys.executable, "-m", "ziglang", "cc", "-target", zig])
    built = report.out / ("example.exe" if "windows" in target else "example")
    assert built.read_bytes().startswith(head)
    assert (report.out / "Dockerfile").exists() == ("windows" in target)
    assert report.runtime < 20e6


def test_platforms_name_their_libraries() -> None:
    names = {t: platform_of(t) for t in ("x86_64-linux-gnu", "arm64-apple-macos13.0", "x86_64-pc-windows-gnu")}
    assert [p.libraries("cuda")[1] for p in names.values() if p] == [
        "libtvm_runtime_cuda.so", "libtvm_runtime_cuda.dylib", "tvm_runtime_cuda.dll",
    ]  # fmt: skip
    mac = names["arm64-apple-macos13.0"]
    assert mac is not None and mac.libraries("metal") == ["libtvm_runtime.dylib", "libtvm_runtime_metal.dylib"]


# Slow: downloads 270 MB of wheels.
@pytest.mark.slow
@pytest.mark.parametrize("triple", ["aarch64-linux-gnu", "arm64-apple-macos13.0", "x86_64-pc-windows-gnu"])
def test_libraries_of_other_platforms_come_out_of_wheels(triple: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    kind = "metal" if "macos" in triple else "cpu"
    found = runtime_files(kind, triple, "0.27.0.post1")
    heads = {"aarch64-linux-gnu": b"\x7fELF", "arm64-apple-macos13.0": b"\xcf\xfa\xed\xfe", "x86_64-pc-windows-gnu": b"MZ"}
    assert len(found) >= 2 and all(p.read_bytes().startswith(heads[triple]) for p in found)
    shutil.rmtree(tmp_path)
