"""One variant of an artifact as a folder that a machine needs nothing else for but Python packages or a C compiler.

::

    DIR/model/            the artifact with that variant alone, its weights, the tokenizer and the platform's native libraries
    DIR/run.py, python/   text in, text out; the thin runtime's own sources; requirements.txt, and a Dockerfile but for macOS
    DIR/example.c         token ids in, token ids out, over tvm-ffi's C ABI (CPUs, CUDA and Metal); include/, model.txt
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llmc import manifest, targets
from llmc.artifact import ArtifactWriter, explained, files_below, link_files, write_manifest
from llmc.deploy.c_index import DEVICES, c_index
from llmc.deploy.c_index import FILE_NAME as INDEX
from llmc.deploy.programs import build_command, dockerfile
from llmc.deploy.sources import thin_sources
from llmc.errors import MissingExtraError, UsageError
from llmc.extras import require
from llmc.manifest import Manifest, Variant
from llmc.progress import Clock, Progress, SilentProgress
from llmc.runtime.artifact import check_sizes, check_versions
from llmc.runtime.platforms import platform_of
from llmc.runtime.weights import stored_weights
from llmc.sbom import write_sbom
from llmc.targets.link import import_library
from llmc.wheels import runtime_files

MODEL = "model"
_REQUIREMENTS = ("apache-tvm-ffi", "numpy", "tokenizers", "jinja2")
_CUDA_REQUIREMENT = "nvidia-cuda-runtime==13.*"
_HEADERS = ("tvm/ffi/c_api.h", "dlpack/dlpack.h")
_REPORT = "report.json"


@dataclass(frozen=True)
class PackageReport:
    """Bytes on disk: ``total``, ``weights`` and ``tokenizer``; the rest is what runs them. ``seconds`` by phase."""

    out: Path
    target: str
    total: int
    weights: int
    tokenizer: int
    seconds: dict[str, float]

    @property
    def runtime(self) -> int:
        return self.total - self.weights - self.tokenizer


def package(
    artifact: Path | str, *, target: str, out: Path | str, force: bool = False, progress: Progress | None = None
) -> PackageReport:
    """Write the smallest folder ``out`` that runs the artifact's variant for ``target``: ``"cpu:x86-64-v3"``, or ``"cpu"`` where it
    has one of that kind only.

    Native libraries are the installed ones if the target is this kind of machine, else they come out of the wheels of TVM for it.

    Raises UsageError if there is no such variant, ArtifactError if the artifact is damaged, OutputError if ``out`` is taken
    (without ``force``) or cannot be written, or no libraries can be had for the target, MissingExtraError without the compiler's
    packages.
    """
    require("compile", "packaging an artifact")
    folder, clock = Path(artifact), Clock(progress or SilentProgress())
    whole = manifest.read(folder)
    check_versions(whole, folder)
    check_sizes(whole, folder)
    variant = _variant(whole, folder, target)
    with ArtifactWriter(Path(out), force=force, marker=f"{MODEL}/{manifest.FILE_NAME}") as writer, explained(writer.out):
        model = writer.root / MODEL
        with clock.phase("libraries"):
            libraries = runtime_files(variant.kind, variant.triple, whole.tvm)
            (model / "runtime").mkdir(parents=True)
            for library in libraries:
                shutil.copy2(library, model / "runtime" / library.name)
        kept = [variant.library, *(name for name in whole.files if name.startswith("tokenizer/") or name == _REPORT)]
        link_files(folder, model, kept)
        with clock.phase("weights"):
            alone = _with_weights(whole, variant, folder, model)
        write_sbom(alone, model)
        write_manifest(alone, model)
        with clock.phase("programs"):
            _write_programs(alone, variant, writer.root)
        weights, tokenizer, total = map(_bytes, (model / "weights", model / "tokenizer", writer.root))
        writer.rename()
    return PackageReport(writer.out, variant.target, total, weights, tokenizer, clock.seconds)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_below(folder))


def _variant(m: Manifest, folder: Path, target: str) -> Variant:
    """The variant whose target is ``target``, however it is spelled, or the only one of the kind that it names."""
    exact = [v for v in m.variants if v.target == target]
    if not exact and ":" in target:
        canonical = targets.parse(target).name
        exact = [v for v in m.variants if v.target == canonical]
    found = exact or [v for v in m.variants if v.kind == target]
    if len(found) == 1:
        return found[0]
    there = ", ".join(v.target for v in m.variants)
    what = f"has {len(found)} variants for {target}" if found else f"has no variant for {target}"
    raise UsageError(f"the artifact {folder} {what}: choose from {there}, or make one with `llmc add {folder} --target {target}`")


def _with_weights(m: Manifest, variant: Variant, folder: Path, model: Path) -> Manifest:
    """The artifact's weights that the variant needs, in ``model``, and the manifest of what is there then.

    A file is taken as it is if the variant needs all of it, else what it needs is written anew.
    """
    needed = dict.fromkeys(variant.weights)
    whole = {t.file for t in m.tensors.values()} - {t.file for name, t in m.tensors.items() if name not in needed}
    tensors = {name: m.tensors[name] for name in needed}
    link_files(folder, model, sorted({t.file for t in tensors.values()} & whole))
    rest = [name for name in needed if tensors[name].file not in whole]
    if rest:
        from llmc.importer.params import Param, ParamTable
        from llmc.weights_file import Held, write_weights

        held = stored_weights(folder, m.tensors, rest)
        table = ParamTable([Param(name, Held(w, tensors[name]), w.dtype) for name, w in zip(rest, held, strict=True)])
        written = write_weights(table, model, "weights", lambda nbytes, name: None, 1 + len({t.file for t in m.tensors.values()}))
        tensors |= {name: replace(tensors[name], file=written.tensors[name].file) for name in rest}
    return replace(m, variants=[variant], tensors=tensors, files={})


def _write_programs(m: Manifest, variant: Variant, root: Path) -> None:
    """What runs the model: the Python loader, a container, and the C example where TVM's own libraries run the target."""
    platform = platform_of(variant.triple)
    assert platform is not None  # it has runtime libraries
    thin_sources(root / "python")
    lines = [f"{name}=={_version(name)}" for name in _REQUIREMENTS] + ([_CUDA_REQUIREMENT] if variant.kind == "cuda" else [])
    (root / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = {"run.py": _text("run.py")}
    container = dockerfile(variant.kind, platform)
    if container is not None:
        texts["Dockerfile"] = container
    if variant.kind in DEVICES:
        texts["example.c"] = _text("example.c").replace("@BUILD@", build_command(variant.kind, platform))
        texts[INDEX] = c_index(m, variant, root / MODEL)
        for header in _HEADERS:
            _copy_header(header, root / "include")
        if platform.name.startswith("windows"):
            import_library(root, variant.triple)
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")


def _text(name: str) -> str:
    return resources.files(__name__).joinpath("files", name).read_text(encoding="utf-8")


def _copy_header(header: str, include: Path) -> None:
    from importlib.util import find_spec

    spec = find_spec("tvm_ffi")
    source = next((Path(f) / "include" / header for f in (spec.submodule_search_locations or [])), None) if spec else None
    if source is None or not source.is_file():
        raise MissingExtraError(f"packaging needs {header} of apache-tvm-ffi, not installed here: run `pip install llmc`")
    (include / header).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, include / header)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise MissingExtraError(f"packaging pins {name}, not installed here: run `pip install {name}`") from error
