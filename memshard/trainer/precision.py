"""Which arithmetic a device gets."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from memshard.models.memory.table import find_tables

TABLE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. precision: "auto", "fp32" or "bf16"; auto is bf16 from CUDA capability 8.0 on."""
    if precision == "auto":
        # is_bf16_supported() says yes to emulation on older cards; the capability does not.
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """The context of forward passes: parameters stay fp32, matrix products run in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def store_tables(model: nn.Module, dtype: str) -> None:
    """Give all value tables of the model the recipe's dtype."""
    for _, table in find_tables(model):
        table.to(TABLE_DTYPES[dtype])
