"""Packaging of llmc: the base install is the thin runtime; ``[compile]`` adds the compiler, ``[cuda]`` what
compiling for and running on NVIDIA GPUs takes beside a driver; ``[tune]`` what searching for faster kernels takes besides
``[compile]``; ``[all]`` everything."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((ROOT / "llmc" / "version.py").read_text(encoding="utf-8"), VERSION)

RUNTIME = [
    "apache-tvm-ffi>=0.1.14.post0,<0.1.15",
    "numpy>=2.0",
    "tokenizers>=0.23",
    "jinja2>=3.1",
    "rich>=14",
    "filelock>=3.16",
]
COMPILE = [
    "apache-tvm==0.27.0.post1",
    "torch==2.13.0",
    "transformers==5.23.0",
    "accelerate>=1.0",
    "safetensors>=0.8",
    "gguf==0.19.0",
    "ml-dtypes>=0.5",
    "huggingface-hub>=1.0",
    "ziglang==0.17.1",
    "sentencepiece>=0.2",
    "cyclonedx-python-lib>=11,<12",
]
CUDA = ["nvidia-cuda-nvrtc==13.*", "nvidia-cuda-runtime==13.*", "nvidia-cuda-cccl==13.*"]
TUNE = ["xgboost>=3,<4", "scipy>=1.11"]
DEV = ["pytest>=9", "pytest-xdist>=3.8", "pytest-timeout>=2.4", "ruff==0.17.6", "mypy==2.4.1", "psutil>=6"]

PACKAGE_DIRS = {"llmc.passes": "passes", "llmc.schedules": "schedules", "llmc.targets": "targets"}


def packages() -> list[str]:
    """Every package of the tree under its installed name: ``passes/x`` is ``llmc.passes.x``."""
    found = [str(p.parent.relative_to(ROOT)).replace("/", ".") for p in sorted((ROOT / "llmc").rglob("__init__.py"))]
    for installed, folder in PACKAGE_DIRS.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            below = init.parent.relative_to(ROOT / folder).parts
            found.append(".".join((installed, *below)))
    return found


setup(
    name="llmc",
    version=VERSION["__version__"],
    description="An ML compiler for LLM inference: any decoder model to a relocatable artifact, on Apache TVM",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": ".", **PACKAGE_DIRS},
    packages=packages(),
    package_data={"llmc.schedules": ["records/*.jsonl"], "llmc.deploy": ["files/*"], "llmc.texts": ["*.txt"]},
    install_requires=RUNTIME,
    extras_require={
        "compile": COMPILE,
        "cuda": CUDA,
        "tune": TUNE,
        "all": COMPILE + CUDA + TUNE,
        "dev": COMPILE + CUDA + TUNE + DEV,
    },
    entry_points={"console_scripts": ["llmc=llmc.cli.main:entry"]},
)
