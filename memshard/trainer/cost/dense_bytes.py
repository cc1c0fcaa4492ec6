"""Bytes of dense parameters, their gradients and optimizer states on a rank, in closed form."""

from memshard.trainer.config.training import TrainConfig
from memshard.trainer.optim.dense.kinds import DenseKind

BUCKET = 50_000_000
"""Most values that DeepSpeed sums or sends at a time; its default of 5e8 takes 2 GB."""


def dense_bytes(
    settings: TrainConfig, kind: DenseKind, dense: float, largest: float, ranks: int, half: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the bytes of `dense_weights`, `dense_gradients` and `dense_moments` on the device, and
    those in host memory.

    dense, largest: values of all dense parameters, and of the largest. ranks: number of ranks that
    train on different sequences. half: the arithmetic is fp16 or bf16.
    """
    part = updated_values(settings, dense, largest, ranks)
    if settings.engine == "torch":
        return {
            # fp32, and under autocast the copies of 16 bits that its cache keeps.
            "dense_weights": dense * (6 if half else 4),
            "dense_gradients": dense * 4,
            "dense_moments": part * kind.state_bytes,
        }, {}
    item = 2 if half else 4
    if settings.zero == 0:
        return {
            "dense_weights": dense * 4,
            "dense_gradients": dense * 4,
            "dense_moments": part * kind.state_bytes,
        }, {}
    # The masters, and the gradients that they are updated with, are fp32 and split.
    sums = item * min(dense, BUCKET) * (1 if settings.offload else 2)
    gradients = item * (dense if settings.zero == 1 else part) + sums
    states = {
        "dense_weights": part * 4,
        "dense_gradients": part * 4,
        "dense_moments": part * kind.state_bytes,
    }
    weights = item * dense
    if settings.offload:
        return {"dense_weights": weights, "dense_gradients": gradients}, states
    return {
        "dense_weights": weights + states["dense_weights"],
        "dense_gradients": gradients + states["dense_gradients"],
        "dense_moments": states["dense_moments"],
    }, {}


def updated_values(settings: TrainConfig, dense: float, largest: float, ranks: int) -> float:
    """Return how many dense values a rank updates; it keeps their moments."""
    if not settings.zero:
        return dense
    # Our ZeRO does not cut parameters.
    return max(dense / ranks, largest) if settings.engine == "torch" else dense / ranks


def dense_traffic(
    settings: TrainConfig, dense: float, ranks: int, micro_batches: int, half: bool
) -> float:
    """Return the bytes that a rank sends in a step to sum dense gradients and, with ZeRO, to share
    what it has updated.
    """
    item = 2 if half and settings.engine == "deepspeed" else 4
    if settings.zero == 0:
        passes = 2  # an all-reduce is a reduce-scatter and an all-gather
    elif settings.engine == "torch":
        # The all-reduce, and a broadcast of each parameter by the rank that updated it.
        passes = 3
    else:
        passes = 1 + (micro_batches if settings.zero == 2 else 1)
    return passes * item * (ranks - 1) / ranks * dense
