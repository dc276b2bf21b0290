"""The variants of one artifact: a compiled module for each target, over weights that all of them share."""

from __future__ import annotations

from pathlib import Path

from llmc import targets
from llmc.importer.params import Param, ParamTable
from llmc.manifest import Variant
from llmc.passes.pipeline import Lowered
from llmc.targets.base import Target, folder_name


class SharedWeights:
    """``table``: the weights of all variants, each stored once. Where two targets store one weight differently (another dtype,
    another layout), the later one's gets a name of its own: ``lm_head.weight@2``."""

    def __init__(self) -> None:
        self.table = ParamTable()

    def share(self, names: list[str], params: ParamTable) -> list[str]:
        """Add the weights ``names`` of a variant; the names they are stored by, in the same order."""
        return [self._place(params[name]) for name in names]

    def _place(self, param: Param) -> str:
        name, number = param.name, 1
        while name in self.table:
            held = self.table[name]
            if (held.shape, held.dtype, held.source.describe()) == (param.shape, param.dtype, param.source.describe()):
                return name
            number += 1
            name = f"{param.name}@{number}"
        self.table.add(name, param.source, param.dtype).scheme = param.scheme
        return name


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
