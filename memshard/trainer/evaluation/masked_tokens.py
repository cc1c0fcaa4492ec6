"""How many hidden tokens an encoder finds."""

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
    """Share of the held-out tokens to be found whose best guess is right; the draws are those of
    the held-out loss.

    Arguments as of `evaluate`; the model is in evaluation mode.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=task.device)
    for first in range(0, held_out.windows, rows * ranks):
        inputs, targets, ctx = task.hidden(held_out.batch(first + rank * rows, rows), None)
        with autocast(dtype, task.device):
            guesses = model(inputs, ctx)[0].argmax(-1)
        found = targets != IGNORE
        totals += torch.stack(((guesses == targets)[found].sum(), found.sum()))
    right, all_found = all_sum(totals).tolist()
    return float(right / max(all_found, 1))
