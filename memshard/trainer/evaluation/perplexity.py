"""Held-out loss, and what follows from it."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.records import HeldOutRecords
from memshard.models.memory.usage import UsageCounter, UsageReport
from memshard.parallel.collectives import all_sum
from memshard.trainer.evaluation.usage import observed_usage, usage_reports
from memshard.trainer.precision import autocast
from memshard.trainer.tasks.language_model import LanguageModelTask


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token, over `tokens` predicted tokens; usage: of every table, by name; counters: of this rank's rows."""

    loss: float
    tokens: int
    usage: dict[str, UsageReport]
    counters: dict[str, UsageCounter]

    @property
    def perplexity(self) -> float:
        """exp(loss): per token of this tokenizer, so not comparable between tokenizers."""
        return math.exp(self.loss)

    def word_perplexity(self, words: int) -> float:
        """Perplexity per word: the tokens' total loss over the words of the same text."""
        return math.exp(self.loss * self.tokens / words)

    def bits_per_byte(self, text_bytes: int) -> float:
        """Total loss in bits over the UTF-8 bytes of the same text."""
        return self.loss * self.tokens / math.log(2) / text_bytes


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: LanguageModelTask,
    held_out: HeldOutStream | HeldOutRecords,
    rows: int,
    dtype: torch.dtype,
    rank: int = 0,
    ranks: int = 1,
) -> Evaluation:
    """Loss over all held-out windows, `rows` at a time a rank; every rank must call it, with the same arguments.

    rank, ranks: which of how many shares this rank evaluates; tensor-parallel ranks have the same share, and each its loss.
    """
    training = model.training
    model.eval()
    try:
        total = torch.zeros((), dtype=torch.float64, device=task.device)
        with observed_usage(model) as counters:
            # Every rank does as many passes, the last ones perhaps on filler: reads of a sharded table need all ranks.
            for first in range(0, held_out.windows, rows * ranks):
                batch = held_out.batch(first + rank * rows, rows)
                with autocast(dtype, task.device):
                    total += task.loss(model, batch).double()
    finally:
        model.train(training)
    same = dist.get_world_size() // ranks if dist.is_initialized() else 1
    loss = float(all_sum(total)) / same / held_out.tokens
    return Evaluation(loss, held_out.tokens, usage_reports(counters), counters)
