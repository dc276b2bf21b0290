"""The variants of one artifact: a compiled module for each target, over weights that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmc import targets
from llmc.artifact import link_files
from llmc.importer.params import Param, ParamTable
from llmc.manifest import FileInfo, TensorInfo, Variant
from llmc.passes.pipeline import Lowered
from llmc.runtime.weights import stored_weights
from llmc.targets.base import Target, folder_name
from llmc.weights_file import Written, stored

if TYPE_CHECKING:
    from llmc.importer.model import ImportedModel


class HeldWeights:
    """The weights that an artifact has already, compared by their bytes: it does not say what they were made from."""

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo]) -> None:
        self._folder, self._tensors = folder, tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def same(self, name: str, param: Param) -> bool:
        """Whether ``name`` is what ``param`` would be stored as. Reads both, one tensor at a time."""
        info = self._tensors[name]
        if (info.dtype, tuple(info.shape)) != (param.dtype, param.shape):
            return False
        (held,) = stored_weights(self._folder, self._tensors, [name])
        return np.array_equal(stored(param).reshape(-1).view(np.uint8), held.array.reshape(-1).view(np.uint8))


@dataclass
class Earlier:
    """What compiles of one model have in common: its graphs by data type of the computation, and the weights that were written,
    whose ``files`` are kept in ``folder`` (None: they are not), with the parameters that they were written from."""

    folder: Path | None = None
    graphs: dict[str, ImportedModel] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    files: dict[str, FileInfo] = field(default_factory=dict)
    params: dict[str, Param] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.params

    def same(self, name: str, param: Param) -> bool:
        """Whether ``name`` is what ``param`` would be stored as, known from where they come from."""
        return _alike(self.params[name], param)

    def link(self, root: Path) -> None:
        """The weights there are, below ``root`` too."""
        if self.folder is not None:
            link_files(self.folder, root, self.files)

    def keep(self, root: Path, table: ParamTable, written: Written) -> None:
        """The weights of ``table`` were ``written`` below ``root``."""
        if self.folder is not None:
            link_files(root, self.folder, written.files)
            self.tensors |= written.tensors
            self.files |= written.files
            self.params |= {param.name: param for param in table.values()}


class SharedWeights:
    """``table``: the weights of all variants that are yet to be written, each once. Where two targets store one weight differently
    (another dtype, another layout), the later one's gets a name of its own: ``lm_head.weight@2``. ``held``: what is written."""

    def __init__(self, held: HeldWeights | Earlier | None = None) -> None:
        self.table = ParamTable()
        self._held = held

    def share(self, names: list[str], params: ParamTable) -> list[str]:
        """Add the weights ``names`` of a variant; the names they are stored by, in the same order."""
        return [self._place(params[name]) for name in names]

    def _place(self, param: Param) -> str:
        name, number = param.name, 1
        while True:
            if self._held is not None and name in self._held:
                if self._held.same(name, param):
                    return name
            elif name in self.table:
                if _alike(self.table[name], param):
                    return name
            else:
                break
            number += 1
            name = f"{param.name}@{number}"
        self.table.add(name, param.source, param.dtype).scheme = param.scheme
        return name


def _alike(one: Param, other: Param) -> bool:
    """Whether two parameters are stored as the same bytes, known from where they come from."""
    return (one.shape, one.dtype, one.source.describe()) == (other.shape, other.dtype, other.source.describe())


def build_variant(lowered: Lowered, target: Target, weights: list[str], root: Path) -> Variant:
    """Generate machine code for ``target`` and link it into ``root/variants/<name>/lib.so``; what the manifest says of it.

    ``weights``: the names in the artifact of the module's weight arguments.
    """
    module = targets.module_for(target)
    name = folder_name(target)
    library = Path("variants") / name / "lib.so"
    executable = module.build(lowered.mod, target)
    (root / library.parent).mkdir(parents=True)
    module.export(executable, target, str(root / library))
    return Variant(
        name=name,
        target=target.name,
        kind=target.kind,
        triple=target.triple,
        mcpu=target.mcpu,
        features=list(target.features),
        library=library.as_posix(),
        functions=lowered.functions,
        weights=weights,
        kernels=lowered.kernels,
    )
