"""AdamW for the dense parameters, and its learning rate."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from memshard.trainer.config.optimizers import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_adamw(parameters: Sequence[Tensor], config: OptimizerConfig) -> AdamW:
    """AdamW over the parameters, possibly none; vectors (norms, biases) are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return AdamW(filled or groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def make_states(optimizer: Optimizer, tensors: Iterable[Tensor]) -> None:
    """Give AdamW the states of the tensors that its first step would make; a checkpoint loads into
    them.
    """
    for tensor in tensors:
        step = torch.zeros((), dtype=torch.float32, device=tensor.device)
        optimizer.state[tensor] = {"step": step} | {
            moment: torch.zeros_like(tensor) for moment in MOMENTS
        }


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank keeps the optimizer state of each parameter: the largest first, each to the rank
    that has least.
    """
    held = [0] * ranks
    found = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        found[number] = held.index(min(held))
        held[found[number]] += sizes[number]
    return found


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0, in a run of `steps`: linear warm-up, then the
    schedule.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "inverse_sqrt":
        return config.lr * math.sqrt(max(config.warmup, 1) / (step + 1))
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
        return config.lr * (
            config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        )
    return config.lr
