"""Your own training loop around memshard's step: no recipe, run folder or data shards. On
several processes the table is split over them, and the losses stay the same.

    python examples/own_loop.py
    torchrun --standalone --nproc-per-node 2 examples/own_loop.py

No downloads: the text is Python's own help pages, read as bytes.
"""

from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memshard import (
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    TableOptimizerConfig,
    TrainConfig,
    build_for_training,
    training_step,
)
from memshard.parallel.mesh import build_mesh

LENGTH, BATCH, MICRO_BATCH = 128, 16, 4
# With query_norm="batch", the default, losses would depend on who shares a micro-batch.
MEMORY = MemoryConfig(layers=(1,), keys=64, heads=2, topk=16, key_dim=64, query_norm="layer")
MODEL = ModelConfig(vocab_size=256, layers=3, dim=128, max_length=LENGTH, memory=MEMORY)


def text() -> Tensor:
    """Return real text as bytes, [rows, LENGTH + 1]."""
    data = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
    return data[: len(data) // (LENGTH + 1) * (LENGTH + 1)].long().view(-1, LENGTH + 1)


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the share of some rows in the batch's mean loss."""
    return model(rows[:, :-1], targets=rows[:, 1:])[0].sum() / (BATCH * LENGTH)


def train(steps: int) -> list[float]:
    """Return the loss of each step; every process takes its rows of the batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    training = build_for_training(
        MODEL,
        OptimizerConfig(lr=3e-3, warmup=5),
        TableOptimizerConfig(lr=1e-2),
        TrainConfig(steps=steps),
        device=device,
        mesh=build_mesh(device),
    )
    rows, losses = text().to(device), []
    for step in range(steps):
        batch = rows[step * BATCH : (step + 1) * BATCH][rank::ranks]
        outcome = training_step(training, batch.split(MICRO_BATCH), loss, step)
        losses.append(outcome.loss)
    return losses


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    losses = train(40)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step 40")
    if dist.is_initialized():
        dist.destroy_process_group()
