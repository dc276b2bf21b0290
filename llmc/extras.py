"""Optional installs: ``pip install llmc`` is the thin runtime, and a feature that needs more says which command adds it."""

from __future__ import annotations

from importlib.util import find_spec

from llmc.errors import MissingExtraError

# import name -> package name, by extra, as in setup.py
PACKAGES: dict[str, dict[str, str]] = {
    "compile": {
        "tvm": "apache-tvm",
        "torch": "torch",
        "transformers": "transformers",
        "accelerate": "accelerate",
        "safetensors": "safetensors",
        "gguf": "gguf",
        "ml_dtypes": "ml-dtypes",
        "huggingface_hub": "huggingface-hub",
        "ziglang": "ziglang",
        "sentencepiece": "sentencepiece",
        "cyclonedx": "cyclonedx-python-lib",
    },
    "tune": {"xgboost": "xgboost", "scipy": "scipy"},
}


def missing(extra: str) -> list[str]:
    """The packages of ``extra`` that cannot be imported here, by their names on the package index. Imports none of them."""
    return [package for module, package in PACKAGES[extra].items() if find_spec(module) is None]


def require(extra: str, feature: str) -> None:
    """Raise MissingExtraError with the command to run unless every package of ``extra`` can be imported.

    ``feature`` is what was asked for, as the start of the sentence: ``"compiling a model"``.
    """
    absent = missing(extra)
    if absent:
        raise MissingExtraError(f'{feature} needs {", ".join(absent)}, not installed here: run `pip install "llmc[{extra}]"`')
