"""The process that has the device.

Imported before torch, which looks for CUDA once, when it is loaded.
"""

import ctypes
import faulthandler
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("guard.cpp")
BUILD_SECONDS = 240
BODY_SECONDS = 240


modes: tuple[Any, ...] = ()
"""Modes of torch, which are a thread's own, that every thread shall have."""


@cache
def process() -> ProcessPoolExecutor:
    """Return the process, started at the first call. OSError if something is missing for it."""
    if find_spec("triton") is None:
        raise OSError("needs triton: pip install --no-deps triton==3.7.1")
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (guard(),))


def call(body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return body(*args), or end the process with a traceback if that takes too long."""
    faulthandler.dump_traceback_later(BODY_SECONDS, exit=True)
    try:
        return body(*args)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _run_watched(thread: threading.Thread) -> None:
    with ExitStack() as entered:
        for mode in modes:
            entered.enter_context(mode)
        _run(thread)


_run = threading.Thread.run


def _prepare(guard: Path) -> None:
    assert "torch" not in sys.modules
    ctypes.CDLL(str(guard), mode=ctypes.RTLD_GLOBAL)
    import torch

    from tests.gpu import fake_device, fake_triton, python_side

    torch.set_num_threads(1)
    threading.Thread.run = _run_watched
    fake_device.install()
    python_side.install()
    fake_triton.install()


def guard() -> Path:
    """Return the device guard, compiled at the first call on a machine. OSError without a compiler,
    RuntimeError with its message if it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler: install g++, or set CXX")
    import torch

    package = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{package}/include"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", str(SOURCE)]
    command += [f"-L{package}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{package}/lib"]
    facts = "\0".join((*command, torch.__version__, SOURCE.read_text("utf-8")))
    name = f"guard-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "memshard/fake_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / name
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of many test processes one compiles, in some 10 s
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                new = Path(scratch) / name
                done = subprocess.run(
                    [*command, "-o", str(new)],
                    capture_output=True,
                    text=True,
                    timeout=BUILD_SECONDS,
                )
                if done.returncode:
                    raise RuntimeError(f"{compiler} failed on {SOURCE}:\n{done.stderr}")
                os.replace(new, built)
    return built
