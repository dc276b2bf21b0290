"""Parse and type-check generated Metal Shading Language with clang, on whose C++ front end Apple's own compiler is built."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
_WIDTH = {"float": 4, "int": 4, "uint": 4, "half": 2, "ushort": 2, "uchar": 1, "char": 1, "long": 8}


def diagnostics(source: str) -> str:
    """What clang (from the ziglang package) objects to in a module's source; empty if nothing.

    Metal's ``threadgroup`` variables are local to a kernel; to C++ they are static.
    """
    text = re.sub(r"^(\s*)threadgroup (\w+ \w+\[)", r"\1static THREADGROUP \2", source, flags=re.M)
    text = re.sub(r"\bthreadgroup\b", "THREADGROUP", text)
    # Metal compiles each function of the module by itself.
    parts = [re.sub(r"^(#include.*|using namespace.*)$", "", part, flags=re.M) for part in text.split("// Function: ")]
    spaces = [f"namespace part{i} {{ // {part}\n}}" for i, part in enumerate(parts) if part.strip()]
    text = "\n".join(["#include <metal_stdlib>", "using namespace metal;", *spaces])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cpp"
        path.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "ziglang", "clang", "--target=arm64-apple-macos13.0", "-fsyntax-only", "-std=c++17"]
        flags = ["-nostdinc", "-Wall", "-Wno-unknown-attributes", "-Wno-unused", "-Wno-unknown-pragmas", "-Werror", f"-I{HERE}"]
        done = subprocess.run([*command, *flags, str(path)], capture_output=True, text=True, check=False)
    return done.stderr


def wrong_casts(source: str) -> list[str]:
    """Casts of a pointer to another address space than its variable's, which C++ would let pass."""
    found = []
    for part in source.split("// Function: "):
        spaces = {name: space for space, name in re.findall(r"\b(device|threadgroup|thread|constant) \w+[*&]? (\w+)(?= *\[)", part)}
        for cast, space, name in re.findall(r"(\((device|threadgroup|thread|constant) \w+\*\)\((\w+) \+)", part):
            if spaces.get(name) != space:
                found.append(cast)
    return found


def threadgroup_memory(source: str) -> dict[str, int]:
    """Bytes of threadgroup memory of each kernel."""
    found = {}
    for kernel in source.split("kernel void ")[1:]:
        arrays = re.findall(r"^\s*threadgroup (\w+?)([234]?) \w+\[(\d+)\];", kernel, flags=re.M)
        found[kernel.split("(")[0]] = sum(_WIDTH[t] * int(lanes or 1) * int(count) for t, lanes, count in arrays)
    return found
