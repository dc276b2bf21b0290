"""What differs between packages by platform and kind of target: the container, and how the C example is built."""

from __future__ import annotations

from llmc.runtime.platforms import Platform

_SLIM = "python:3.12-slim"
_INSTALL = "RUN pip install --no-cache-dir -r requirements.txt"
_DEBIAN = "RUN apt-get update && apt-get install -y --no-install-recommends {} && rm -rf /var/lib/apt/lists/*"

_CONTAINERS: dict[str, tuple[str, str, list[str]]] = {
    "cpu": ("", _SLIM, [_INSTALL]),
    "cuda": ("--gpus all ", _SLIM, [_INSTALL]),
    "rocm": (
        "--device /dev/kfd --device /dev/dri ",
        "rocm/dev-ubuntu-24.04",
        [_DEBIAN.format("python3-pip python-is-python3"), f"{_INSTALL} --break-system-packages"],
    ),
    "opencl": (
        "",
        _SLIM,
        [
            "# The device's own driver in the place of PoCL, which runs kernels on the processor.",
            "ARG DRIVER=pocl-opencl-icd",
            _DEBIAN.format("ocl-icd-libopencl1 $DRIVER"),
            _INSTALL,
        ],
    ),
}
"""Flags of ``docker run``, image and set-up for each kind of target on Linux."""


def dockerfile(kind: str, platform: Platform) -> str | None:
    """The text of a Dockerfile; None where no container can run the model: macOS has none, and Metal is there alone."""
    if platform.name.startswith("macos"):
        return None
    flags, image, setup = _CONTAINERS[kind]
    if platform.name.startswith("windows"):
        image = "python:3.12-windowsservercore-ltsc2022"
    elif platform.name.endswith("aarch64"):
        image = f"--platform=linux/arm64 {image}"
    lines = [
        f'# docker build -t model . && docker run --rm {flags}model "The capital of France is"',
        f"FROM {image}",
        "WORKDIR /app",
        "COPY requirements.txt .",
        *setup,
        "COPY python python",
        "COPY run.py .",
        "COPY model model",
        'ENTRYPOINT ["python", "run.py"]',
    ]
    return "\n".join(lines) + "\n"


def build_command(kind: str, platform: Platform) -> str:
    """How the C example is built in its folder."""
    compiler = "cc -O2 -Iinclude example.c"
    if platform.name.startswith("windows"):
        return f"{compiler} tvm_ffi.lib -o example.exe   (by MinGW or zig; model\\runtime must be on the PATH when it runs)"
    libraries = " ".join(
        f"-l{name.removeprefix('lib').split('.')[0]}" for name in (*platform.libraries(kind), platform.ffi_library)
    )
    if platform.name.startswith("macos"):
        return f"{compiler} -Lmodel/runtime {libraries} -Wl,-rpath,@loader_path/model/runtime -o example"
    # Of the device's own libraries nothing is known until it runs.
    undefined = "" if kind == "cpu" else "-Wl,--allow-shlib-undefined "
    found = "-Wl,-rpath,'$ORIGIN/model/runtime'"
    return f"{compiler} -Lmodel/runtime -Wl,--no-as-needed {undefined}{libraries} {found} -o example"
