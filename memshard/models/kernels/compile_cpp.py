"""Compile the C++ kernels with the machine's compiler at first use and load them through ctypes."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

# Without errno and traps, sqrt and floor vectorise. No -ffast-math: sums keep the order that the
# source gives them, so results do not depend on compiler heuristics.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
)
_BUILD_SECONDS = 120

CompileError = (OSError, subprocess.SubprocessError)
"""What `load_library` raises where a machine cannot compile; callers then take plain torch."""


def load_library(source: Path) -> ctypes.CDLL:
    """Compile a C++ file, unless the user's cache has the result, and load it.

    Raises one of `CompileError`, with the compiler's first message.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler: install g++, or set CXX")
    path = _cache_folder() / f"{source.stem}-{_key(source, compiler)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *_FLAGS, "-shared", "-fPIC", str(source), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS)
            if done.returncode:
                raise OSError(
                    f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
                )
            os.replace(built, path)  # other ranks may build the same file at the same time
    # torch has loaded its libgomp.so.1 already, and this library then shares it: two thread pools
    # would spin against each other.
    return ctypes.CDLL(str(path))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memshard"


def _key(source: Path, compiler: str) -> str:
    """Hash source, flags, compiler and processor: machines of several kinds may share a home."""
    version = subprocess.run(
        [compiler, "-dumpfullversion", "-dumpversion"],
        capture_output=True,
        text=True,
        timeout=_BUILD_SECONDS,
    ).stdout
    processor = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        facts = ("model name", "flags", "Features")
        processor += "".join(
            sorted({line for line in info.read_text().splitlines() if line.startswith(facts)})
        )
    return hashlib.sha256(
        "\0".join((source.read_text(), *_FLAGS, compiler, version, processor)).encode()
    ).hexdigest()[:16]
