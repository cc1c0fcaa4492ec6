"""Measure how many hidden tokens an encoder predicts."""

import torch
from torch import nn

from memshard.data_pipeline.stream.batch import IGNORE
from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.records import HeldOutRecords
from memshard.parallel.collectives import all_sum
from memshard.trainer.precision import autocast
from memshard.trainer.tasks.masked_tokens import MaskedTokenTask


@torch.no_grad()
def masked_accuracy(
    model: nn.Module,
    task: MaskedTokenTask,
    held_out: HeldOutStream | HeldOutRecords,
    rows: int,
    dtype: torch.dtype,
    rank: int = 0,
    ranks: int = 1,
) -> float:
    """Return the share of the held-out target tokens whose most likely prediction is right.

    Targets are drawn as for the held-out loss. Arguments are those of `evaluate`; the model is in
    evaluation mode.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=task.device)
    for first in range(0, held_out.windows, rows * ranks):
        inputs, targets, ctx = task.hidden(held_out.batch(first + rank * rows, rows), None)
        with autocast(dtype, task.device):
            guesses = model(inputs, ctx)[0].argmax(-1)
        wanted = targets != IGNORE
        totals += torch.stack(((guesses == targets)[wanted].sum(), wanted.sum()))
    right, count = all_sum(totals).tolist()
    return float(right / max(count, 1))
