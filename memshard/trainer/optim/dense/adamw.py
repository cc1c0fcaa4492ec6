"""AdamW (Loshchilov & Hutter 2019), torch's fused one."""

from typing import Any

from torch.optim import AdamW

from memshard.trainer.config.optimizers import OptimizerConfig


def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> AdamW:
    """Return the optimizer over these parameter groups."""
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
