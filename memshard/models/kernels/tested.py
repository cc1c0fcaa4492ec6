"""Triton kernels that stand in for a function in torch, once they have shown that they agree."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch

from memshard.models.compat import outside_modes
from memshard.models.kernels.backend import SWITCH
from memshard.variables import switch


def tested_kernel(
    device: torch.device, name: str, agrees: Callable[[Any], bool]
) -> Callable[..., Any] | None:
    """Compile a kernel of this folder, such as "triton_scan:scan", for a GPU and return it if it
    agrees with plain torch; None where plain torch is to be taken.
    """
    if switch(SWITCH, "plain") or torch.cuda.get_device_capability(device) < (7, 0):
        return None
    try:
        kernel: Callable[..., Any] = resolve_name(f"memshard.models.kernels.{name}")
        with outside_modes():
            return kernel if agrees(kernel) else None
    # Triton is not installed with torch on every platform, and compiles here: whatever goes wrong
    # must not stop a run.
    except Exception:
        return None
