"""The spaces of CPU families measured whole, for :mod:`tuning`'s ``quality`` to replay searches against.

    python benchmarks/tuning_cpu.py FOLDER [--only attend]     compiles every configuration for this machine into folders
    python FOLDER/attend/run.py                                checks and times them: let nothing else run

Five shapes of each: attention of prompts, bfloat16 layers of prompts, quantized layers of prompts and of decode steps. Steps have
few of the register tiles, which a single row has none of; prompts leave how many panels stay in a cache at its default.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llmc.tvm_setup  # noqa: F401  (first: prepares the import of tvm)

# isort: split
from llmc import targets
from llmc.schedules.cpu import attend, linear, quantized_linear
from llmc.schedules.protocol import KernelCall
from llmc.tune import pack
from llmc.tune.search import Config, enumerate_space
from llmc.tune.task import Task, make
from llmc.tune.tuner import versions

HEADS = ((9, 3, 64), (32, 8, 64), (14, 2, 64), (16, 8, 128), (8, 4, 256))
PLAIN = ((960, 576), (576, 768), (3072, 576), (1536, 768), (576, 576))
PROMPTS = ((960, 576, "q4_1"), (3072, 576, "q4_1"), (576, 1536, "q4_1"), (2048, 2048, "int4_g64"), (576, 1536, "int8_g32"))
STEPS = ((960, 576, "q4_1"), (3072, 576, "q4_1"), (576, 1536, "q4_1"), (2048, 2048, "int4_g64"), (49152, 576, "q8_0"))


@dataclass(frozen=True)
class Spaces:
    """``kept(config, default)``: whether a configuration differs from all others at the sizes that are timed."""

    family: Any
    calls: list[KernelCall]
    kept: Callable[[Config, Config], bool] = lambda config, default: True

    def configurations(self, task: Task) -> list[Config]:
        return [c for c in enumerate_space(task.space, random.Random(0)) if self.kept(c, task.default)]


SPACES = {
    "attend": Spaces(attend, [replace(attend._call(*heads, page_size=16), phase="extend") for heads in HEADS]),
    "linear": Spaces(linear, [linear._call(o, k, "bfloat16") for o, k in PLAIN]),
    "prompts": Spaces(
        quantized_linear,
        [quantized_linear._call(*shape, "extend") for shape in PROMPTS],
        lambda config, default: config["panels"] == default["panels"] and config["row_block"] in (default["row_block"], 24, 96),
    ),
    "steps": Spaces(
        quantized_linear,
        [quantized_linear._call(*shape, "decode") for shape in STEPS],
        lambda config, default: config["rows"] in (default["rows"], 2) and config["turn"] in (default["turn"], 8),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=SPACES, nargs="*", default=list(SPACES))
    options = parser.parse_args()
    target = targets.parse("cpu")
    for name in options.only:
        spaces = SPACES[name]
        tasks = [make(spaces.family, call, target, 1, 1, f"{name} {call.args[1].shape}")[0] for call in spaces.calls]
        chosen = [(task, spaces.configurations(task)) for task in tasks]
        print(name, [len(configs) for _, configs in chosen], flush=True)
        print("\n".join(pack.write(options.folder / name, target, chosen, versions(), lambda *_: None)))


if __name__ == "__main__":
    main()
