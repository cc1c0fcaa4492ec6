"""Held-out loss, perplexity and bits per byte."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.data_pipeline.stream.batch import Batch
from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.records import HeldOutRecords
from memshard.models.memory.slot_usage import UsageCounter, UsageReport
from memshard.models.transformer import Transformer
from memshard.parallel.collectives import all_sum
from memshard.trainer.carried_states import Carried
from memshard.trainer.evaluation.slot_usage import in_evaluation, observed_usage, usage_reports
from memshard.trainer.outage import NO_DATA, NoData, check_away, counted
from memshard.trainer.precision import autocast
from memshard.trainer.tasks.build import Task


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    loss: nats per token, over `tokens` predicted tokens. positions: [length, 2] fp64, the sum of
    losses and the number of tokens at each position of a window, or of the whole text if it was
    read as one. usage: how each table was read, by name. counters: reads of this rank's rows.
    """

    loss: float
    tokens: int
    positions: Tensor
    usage: dict[str, UsageReport]
    counters: dict[str, UsageCounter]

    @property
    def perplexity(self) -> float:
        """exp(loss), per token; not comparable between tokenizers."""
        return math.exp(self.loss)

    def by_position(self) -> list[dict[str, float]]:
        """Return the loss by how many tokens of the window, or text, precede the input: 0, 1, 2 to
        3, 4 to 7, and so on.
        """
        buckets, first = [], 0
        while first < len(self.positions):
            last = min(max(2 * first, 1), len(self.positions))
            total, tokens = self.positions[first:last].sum(0).tolist()
            if tokens:
                buckets.append(
                    {
                        "first": first,
                        "last": last - 1,
                        "tokens": int(tokens),
                        "loss": total / tokens,
                    }
                )
            first = last
        return buckets

    def word_perplexity(self, words: int) -> float:
        """Return exp(total loss / words), with the words of the same text split at white space.

        The loss includes <eos> and white space, the count of words does
        not. Comparable between tokenizers.
        """
        return math.exp(self.loss * self.tokens / words)

    def bits_per_byte(self, text_bytes: int) -> float:
        """Return the total loss in bits divided by the UTF-8 bytes of the same text."""
        return self.loss * self.tokens / math.log(2) / text_bytes


@torch.no_grad()
def evaluate(
    model: Transformer,
    task: Task,
    held_out: HeldOutStream | HeldOutRecords,
    rows: int,
    dtype: torch.dtype,
    rank: int = 0,
    ranks: int = 1,
    carry: bool = False,
) -> Evaluation:
    """Return the loss over all held-out windows, `rows` at a time on each rank. All ranks call it
    with the same arguments. One of NO_DATA on all ranks if one of them cannot read its windows.

    rank, ranks: which of how many shares this rank evaluates; tensor-parallel ranks have the same
    share, and each computes its loss. carry: read the windows as one text, each with the states
    that the previous one left; rows and ranks are then 1, see `check_states`.
    """
    assert not carry or (rows == ranks == 1 and not held_out.overlap)
    carried = Carried(model, 1, lambda samples: samples > 0) if carry else None
    positions = torch.zeros(0, 2, dtype=torch.float64, device=task.device)
    with in_evaluation(model), observed_usage(model) as counters:
        # Every rank makes as many passes, the last ones perhaps on padding, because reads of
        # a sharded table need all ranks.
        for first in range(0, held_out.windows, rows * ranks):
            batch = _read(held_out, first + rank * rows, rows, task.device)
            counts = task.counted(batch)
            # With a stride the first tokens of a window are only context: the window before
            # counted them.
            counts[batch.samples > 0, : held_out.overlap] = False
            with autocast(dtype, task.device):
                losses = task.each_loss(model, batch, carried=carried, wanted=counts)
            if carried is not None:
                carried.commit()
            counts = counts.to(task.device)
            # fp64: added to a sum of a million losses, fp32 keeps one digit of the next.
            sums = torch.stack((losses.double().sum(0), counts.sum(0)), 1)
            positions = (
                torch.cat((positions, sums)) if carry or not len(positions) else positions + sums
            )
    # Tensor-parallel ranks have summed the same losses: divide by how many they are.
    same = dist.get_world_size() // ranks if dist.is_initialized() else 1
    positions = all_sum(positions).cpu() / same
    tokens = round(float(positions[:, 1].sum()))
    return Evaluation(
        float(positions[:, 0].sum()) / max(tokens, 1),
        tokens,
        positions,
        usage_reports(counters),
        counters,
    )


def _read(
    held_out: HeldOutStream | HeldOutRecords, first: int, rows: int, device: torch.device
) -> Batch:
    """Return this rank's next windows; one of NO_DATA if there are none for some rank."""
    away: NoData | None = None
    batch = None
    try:
        batch = held_out.batch(first, rows)
    except NO_DATA as error:
        away = error
    # At every pass: the ranks that go on would wait in the model for the one that cannot.
    check_away(away, *all_sum(torch.tensor(counted(away), device=device)).tolist())
    assert batch is not None
    return batch
