"""Schedule the learning rate of the dense parameters."""

import math

from memshard.trainer.config.optimizers import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0, in a run of `steps`: a linear warm-up,
    then what optimizer.schedule says.
    """
    if step < config.warmup:
        # Step 0 already learns, and the last step of the warm-up has the whole rate.
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "inverse_sqrt":
        # At step + 1 = warmup this is lr, so the two parts meet.
        return config.lr * math.sqrt(max(config.warmup, 1) / (step + 1))
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
        return config.lr * (
            config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        )
    return config.lr
