"""Compile the C++ kernels with the machine's compiler at first use and load them through ctypes.

What is loaded runs with all of the user's rights, so the cache is a folder that only the user can
write to, and a file's name holds the hash of its content.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Compile a C++ file, unless the user's cache has the result, and load it. Of many processes at
    once, one compiles.

    Raises one of `CompileError`, with the compiler's first message.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler: install g++, or set CXX")
    folder, name = _cache_folder(), f"{source.stem}-{_key(source, compiler)}"
    path = _find(folder, name)
    if path is None:
        with _lock(folder / f"{name}.lock"):
            path = _find(folder, name) or _compile(source, compiler, folder, name)
    # torch has loaded its libgomp.so.1 already, and this library then shares it: two thread pools
    # would spin against each other.
    return ctypes.CDLL(str(path))


def _cache_folder() -> Path:
    """Return the folder of compiled files. OSError if it is not the user's own."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    folder = cache / "memshard/kernels"
    for part in (*reversed(folder.parents), folder):
        part.mkdir(mode=0o700, exist_ok=True)
    # Whoever owns the folder above, as in a cache in /tmp, could put another one in this one's
    # place after it was looked at.
    above = folder.parent.stat()
    if {above.st_uid, folder.parent.lstat().st_uid} - {0, os.geteuid()} or above.st_mode & (
        stat.S_IWOTH | stat.S_ISVTX
    ) == stat.S_IWOTH:
        raise OSError(
            f"{folder.parent} is another user's, or everybody can write to it, who could put any "
            "code there: set XDG_CACHE_HOME to a folder of your own"
        )
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        raise OSError(
            f"{folder} is a link or another user's, who could put any code there: remove it, or "
            "set XDG_CACHE_HOME"
        )
    if stat.S_IMODE(facts.st_mode) != 0o700:
        folder.chmod(0o700)
        if facts.st_mode & 0o022:
            for file in folder.glob("*.so"):  # whoever wrote it
                file.unlink(missing_ok=True)
    return folder


def _find(folder: Path, name: str) -> Path | None:
    """Return the compiled file whose content is what its name says; remove damaged ones, whose
    code may do anything.
    """
    for path in folder.glob(f"{name}-*.so"):
        if _digest(path) == path.stem.removeprefix(f"{name}-"):
            return path
        path.unlink(missing_ok=True)
    return None


def _compile(source: Path, compiler: str, folder: Path, name: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "built.so"
        command = [compiler, *_FLAGS, "-shared", "-fPIC", str(source), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS)
        if done.returncode:
            raise OSError(
                f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
            )
        built.chmod(0o700)
        path = folder / f"{name}-{_digest(built)}.so"
        os.replace(built, path)
    return path


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Hold a lock in the block. Where there is none to have, go on without: two processes that
    compile the same file lose only time.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + _BUILD_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


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
            sorted(
                {
                    line
                    for line in info.read_text(encoding="utf-8").splitlines()
                    if line.startswith(facts)
                }
            )
        )
    return hashlib.sha256(
        "\0".join(
            (source.read_text(encoding="utf-8"), *_FLAGS, compiler, version, processor)
        ).encode()
    ).hexdigest()[:16]
