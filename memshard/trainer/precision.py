"""Choose a device's arithmetic, and keep the loss scale that fp16 needs."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from memshard.models.memory.table import find_tables
from memshard.trainer.config.training import LossScaleConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products.

    precision: "fp32", "fp16", "bf16", or "auto": bf16 from CUDA capability 8.0 on, fp16 below, fp32
    on CPU.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    # is_bf16_supported() is also true for slow emulation on older GPUs.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which matrix products run in `dtype`; parameters stay fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def store_tables(model: nn.Module, dtype: str) -> None:
    """Convert all value tables of the model to fp32, fp16 or bf16."""
    for _, table in find_tables(model):
        table.to(DTYPES[dtype])


class LossScale:
    """The factor of losses before backward that keeps small gradients above fp16's smallest
    numbers; 1 in other arithmetic.

    Dynamic (Micikevicius et al. 2018, section 3.2): lower after a gradient that is not finite,
    higher after `growth_interval` steps without one.
    """

    def __init__(self, config: LossScaleConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.dynamic = dtype == torch.float16
        self.value = config.initial if self.dynamic else 1.0
        self.clean_steps = 0
        """Steps since the scale last changed."""

    def update(self, overflow: bool) -> None:
        """Adapt to a step. overflow: whether its gradient was not finite on some rank."""
        if not self.dynamic:
            return
        # Up again after 1,000 clean steps by default: the scale stays within a factor of two of
        # the largest that works, at the price of about one skipped step in 1,000.
        self.clean_steps = 0 if overflow else self.clean_steps + 1
        if overflow:
            self.value *= self.config.backoff
        elif self.clean_steps == self.config.growth_interval:
            self.value /= self.config.backoff
            self.clean_steps = 0

    @property
    def exhausted(self) -> bool:
        """True once the scale is below the smallest that is allowed."""
        return self.dynamic and self.value < self.config.minimum

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps; nothing unless dynamic."""
        return {"value": self.value, "clean_steps": self.clean_steps} if self.dynamic else {}

    def restore(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint, or anew if that was trained in other arithmetic."""
        if self.dynamic:
            self.value, self.clean_steps = (
                state.get("value", self.config.initial),
                int(state.get("clean_steps", 0)),
            )
