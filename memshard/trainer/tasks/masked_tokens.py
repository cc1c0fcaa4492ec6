"""Masked tokens (Devlin et al. 2019, section 3.1): an encoder predicts tokens that were hidden."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memshard.data_pipeline.stream.batch import IGNORE, Batch
from memshard.models.context import Context
from memshard.models.loss import places_of
from memshard.models.random import RandomKey, fold, fold_tensor, random_bits
from memshard.trainer.carried_states import Carried
from memshard.trainer.tasks.to_device import to_device

MASK = 0
"""Replaces a hidden token: <unk>, which no text has, as unknown characters are spelt in bytes."""
_WHICH, _HOW, _OTHER = 0x3A5C0, 0x3A5C1, 0x3A5C2
_TENTHS_HIDDEN, _TENTHS_HIDDEN_OR_OTHER = 8, 9


@dataclass(frozen=True)
class MaskedTokenTask:
    """A share of each row's tokens are targets; of these 8 in 10 are hidden, 1 in 10 is replaced by
    a random token, 1 in 10 stays.

    seed: of all draws, which depend on it, the step and the sample only; evaluation always draws
    the same.
    """

    device: torch.device
    seed: int
    share: float
    vocabulary: int

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        step: int | None = None,
        carried: Carried | None = None,
    ) -> Tensor:
        """Return the sum of the losses of all targets, in nats. step: training step; None in
        evaluation. carried: None, as an encoder has no state.
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
        """Return losses in nats, [batch, length], 0 except at targets that are `wanted`."""
        inputs, targets, ctx = self.hidden(batch, step, wanted)
        losses: Tensor = model(inputs, ctx, targets=targets)[0]
        return losses

    def hidden(
        self, batch: Batch, step: int | None = None, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Context]:
        """Return the model's inputs, the targets (IGNORE elsewhere) and the context.

        wanted: [batch, length] bool, where to keep targets.
        """
        targets_at, real = self.counted(batch, step), batch.targets != IGNORE
        how = self._bits(batch, step, _HOW) % 10
        other = self._bits(batch, step, _OTHER) % self.vocabulary
        inputs = torch.where(targets_at & (how < _TENTHS_HIDDEN), MASK, batch.inputs)
        inputs = torch.where(
            targets_at & (how >= _TENTHS_HIDDEN) & (how < _TENTHS_HIDDEN_OR_OTHER), other, inputs
        )
        if wanted is not None:
            targets_at &= wanted
        targets = torch.where(targets_at, batch.inputs, IGNORE)
        padded, places = not bool(real.all()), places_of(targets_at)
        inputs, targets, real, positions, samples, places = to_device(
            self.device, inputs, targets, real, batch.positions, batch.samples, places
        )
        random = None if step is None else RandomKey(self.seed, step, samples)
        return (
            inputs,
            targets,
            Context(positions, padding=real if padded else None, random=random, predicted=places),
        )

    def counted(self, batch: Batch, step: int | None = None) -> Tensor:
        """Return which tokens are targets, [batch, length] bool: the share of each row, or one."""
        real = batch.targets != IGNORE
        # Take the n tokens with the smallest draws, an exact share where a coin for each token
        # would vary. The argsort of an argsort is each token's rank; padding draws
        # 2^31, above all others.
        drawn = self._bits(batch, step, _WHICH).masked_fill(~real, 1 << 31)
        return (
            drawn.argsort(dim=1, stable=True).argsort(dim=1) < self._numbers(batch)[:, None]
        ) & real

    def loss_tokens(self, batch: Batch) -> Tensor:
        """Return the number of masked tokens, int64."""
        return self._numbers(batch).sum()

    def _numbers(self, batch: Batch) -> Tensor:
        real = (batch.targets != IGNORE).sum(1)
        return torch.minimum((real * self.share).round().long().clamp(min=1), real)

    def _bits(self, batch: Batch, step: int | None, purpose: int) -> Tensor:
        """Return 31 random bits for each token, int64."""
        # A function of seed, step, sample and position only: the same on any number of ranks, in
        # any micro-batch, and after a resume.
        keys = fold_tensor(fold(self.seed, -1 if step is None else step, purpose), batch.samples)
        return random_bits(keys[:, None], batch.positions.int()).long() & 0x7FFFFFFF
