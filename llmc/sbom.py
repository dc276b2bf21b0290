"""What an artifact is made of, and under which licences: a CycloneDX bill of materials, ``sbom.cdx.json``.

It is made from the manifest and the files alone and holds no time and no random number, so that equal artifacts have equal ones.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from llmc.artifact import files_below, hash_file
from llmc.manifest import Manifest

FILE_NAME = "sbom.cdx.json"

_BUILT_WITH = ("apache-tvm", "torch", "transformers", "ziglang", "nvidia-cuda-nvrtc", "nvidia-cuda-cccl")
_RUNS_WITH = ("apache-tvm-ffi", "numpy", "tokenizers", "jinja2")


def write_sbom(contents: Manifest, root: Path) -> None:
    """Write ``root/sbom.cdx.json``: the model, the native libraries in ``root/runtime``, the modules in ``root/variants``, the
    packages that running needs, and those that made the modules."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    model = Component(
        name=contents.model.name,
        version=contents.model.fingerprint[:16],
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        licenses=_licences([contents.model.license]),
        description=f"{contents.model.architecture}, {contents.model.parameters} parameters, compiled by llmc {contents.llmc}",
    )
    parts = [
        *(_file(root, path, "Apache-2.0", "runtime library of Apache TVM") for path in files_below(root / "runtime")),
        *(_file(root, path, None, "machine code that llmc generated") for path in files_below(root / "variants")),
        *_packages(_RUNS_WITH, "needed to run it from Python"),
        *_packages(_BUILT_WITH, "took part in compiling it"),
    ]
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_OID, contents.graph_sha256 + contents.model.fingerprint), components=parts)
    bom.metadata.component = model
    bom.metadata.timestamp = None  # type: ignore[assignment]  # the format allows it, and equal inputs are to give equal bytes
    bom.register_dependency(model, parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = JsonV1Dot6(bom).output_as_string(indent=1)
    (root / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def _file(root: Path, path: Path, licence: str | None, what: str) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    name = path.relative_to(root).as_posix()
    hashed = HashType(alg=HashAlgorithm.SHA_256, content=hash_file(path).sha256)
    kind = ComponentType.FILE
    return Component(name=name, type=kind, bom_ref=name, hashes=[hashed], licenses=_licences([licence]), description=what)


def _packages(names: Iterable[str], what: str) -> list[Any]:
    """The installed ones among ``names``, with the licences that their own metadata gives."""
    from cyclonedx.model.component import Component
    from packageurl import PackageURL

    found = []
    for name in names:
        try:
            package = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        version = package["Version"]
        named = [
            *package.get_all("License-Expression", []),
            *(v.strip().partition("\n")[0] for v in package.get_all("License", [])),
        ]
        named += [c.rpartition(" :: ")[2] for c in package.get_all("Classifier", []) if c.startswith("License ::")]
        url = PackageURL("pypi", name=name, version=version)
        found.append(
            Component(name=name, version=version, bom_ref=str(url), purl=url, licenses=_licences(named[:1]), description=what)
        )
    return found


def _licences(names: Iterable[str | None]) -> list[Any]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [LicenseFactory().make_from_string(name) for name in names if name]
