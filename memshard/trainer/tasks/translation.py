"""Translation: the losses of the target tokens in a batch of sentence pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memshard.data_pipeline.stream.batch import IGNORE, Batch
from memshard.models.context import Context
from memshard.models.loss import places_of
from memshard.models.random import RandomKey
from memshard.trainer.carried_states import Carried
from memshard.trainer.tasks.to_device import to_device


@dataclass(frozen=True)
class TranslationTask:
    """Batches are records `source <eos> target <eos>`. The decoder starts with the source's <eos>.
    seed: of dropout.
    """

    device: torch.device
    eos: int
    seed: int

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        step: int | None = None,
        carried: Carried | None = None,
    ) -> Tensor:
        """Return the sum of the losses of all target tokens, in nats. step: training step, which
        dropout depends on; None in evaluation. carried: None, as pairs have no state.
        """
        return self.each_loss(model, batch, step, carried).sum()

    def each_loss(
        self,
        model: nn.Module,
        batch: Batch,
        step: int | None = None,
        carried: Carried | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Return losses in nats, shaped like `batch.inputs`: a row's target tokens, then 0."""
        length = batch.inputs.shape[1]
        source, real, inputs, targets = split_pairs(batch, self.eos)
        padded, places = not bool(real.all()), places_of(targets != IGNORE)
        source, real, inputs, targets, samples, places = to_device(
            self.device, source, real, inputs, targets, batch.samples, places
        )
        random = None if step is None else RandomKey(self.seed, step, samples)
        source_ctx = Context(
            _positions(source),
            # None lets attention run without a mask, on its fused kernels.
            padding=real if padded else None,
            random=random,
        )
        ctx = Context(
            _positions(inputs), padding=targets != IGNORE, random=random, predicted=places
        )
        losses: Tensor = model(inputs, ctx, targets=targets, source=(source, source_ctx))[0]
        return torch.nn.functional.pad(losses, (0, length - losses.shape[1]))

    def counted(self, batch: Batch) -> Tensor:
        """Return where `each_loss` has a loss, [batch, length] bool."""
        return torch.arange(batch.inputs.shape[1]) < _answers(batch, self.eos)[:, None]

    def loss_tokens(self, batch: Batch) -> Tensor:
        """Return the number of target tokens, int64."""
        return _answers(batch, self.eos).sum()


def split_pairs(batch: Batch, eos: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sources with their <eos>, which of their tokens are real, the decoder's inputs, and
    its targets.

    Shapes: int64 [rows, longest source] twice (the second bool), int64
    [rows, longest target] twice.
    """
    answers, ends = _answers(batch, eos), _ends(batch, eos)
    length = batch.inputs.shape[1]
    places = torch.arange(length)[: int(ends.max()) + 1]
    target_places = torch.arange(length)[: max(1, int(answers.max()))]
    # Targets begin at a different place in each row: gather moves them to column 0. The first input
    # is the source's <eos>, at `ends`, whose target is the first target token.
    shifted = (ends[:, None] + target_places).clamp(max=length - 1)
    targets = batch.targets.gather(1, shifted).masked_fill(
        target_places >= answers[:, None], IGNORE
    )
    return (
        batch.inputs[:, : len(places)],
        places <= ends[:, None],
        batch.inputs.gather(1, shifted),
        targets,
    )


def _ends(batch: Batch, eos: int) -> Tensor:
    """Return where each row's source ends: its first <eos>."""
    return (batch.inputs == eos).int().argmax(1)


def _answers(batch: Batch, eos: int) -> Tensor:
    """Return the number of target tokens of each row, with <eos>."""
    # Filler rows have inputs but no targets: the difference would be negative.
    return ((batch.targets != IGNORE).sum(1) - _ends(batch, eos)).clamp(min=0)


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
