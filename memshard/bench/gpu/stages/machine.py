"""What the machine is: versions, the device, its kernels, its rates."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from memshard.bench.gpu.bench import Bench, Result
from memshard.bench.gpu.clock import copy_rate, product_rate
from memshard.models.kernels.backend import backend_for
from memshard.trainer.cost.this_machine import peak_flops
from memshard.trainer.precision import DTYPES

_PACKAGES = ("torch", "triton", "numpy", "pydantic", "sentencepiece", "transformers", "matplotlib")


def run(bench: Bench) -> Iterator[tuple[str, Result]]:
    """Yield versions, the device, what serves tables, `memshard doctor`'s findings, and rates."""
    yield "versions", {"python": platform.python_version(), **dict(map(_version, _PACKAGES))}
    yield "device", _device(bench)
    yield "rates", _rates(bench)
    yield "tables", {"path": backend_for(bench.device)[1]}
    yield "doctor", _doctor(bench)


def _version(package: str) -> tuple[str, str | None]:
    try:
        return package, metadata.version(package)
    except metadata.PackageNotFoundError:
        return package, None


def _device(bench: Bench) -> Result:
    here: dict[str, Any] = {"cores": os.cpu_count(), "gcc": shutil.which("gcc")}
    if bench.cuda:
        free, memory = torch.cuda.mem_get_info()
        here |= {
            "name": torch.cuda.get_device_name(),
            "number": torch.cuda.device_count(),
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda,
            "memory": memory,
            "free": free,
        }
    return here


def _rates(bench: Bench) -> Result:
    """Return bytes a second of a copy and operations a second of products, and their shares of
    what MFU is measured by.
    """
    rates: Result = {"copy": copy_rate(bench.device)}
    for name in ("fp32", "bf16") if not bench.cuda else DTYPES:
        rate = product_rate(bench.device, DTYPES[name])
        peak = peak_flops(bench.device, DTYPES[name])
        rates[name] = {"flops": rate, "share": rate / peak}
    return rates


def _doctor(bench: Bench) -> Result:
    """Return the findings of the command, as a user would start it."""
    command = [sys.executable, "-m", "memshard", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, bench.left()))
    findings = json.loads(done.stdout)
    return {"bad": findings["bad"], "notes": findings["notes"], "ok": not findings["bad"]}
