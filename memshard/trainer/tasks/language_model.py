"""Language modelling: the losses of the next tokens in a batch of token sequences."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memshard.data_pipeline.stream.batch import IGNORE, Batch
from memshard.models.context import Context
from memshard.models.loss import token_losses
from memshard.models.random import RandomKey
from memshard.trainer.carried_states import Carried
from memshard.trainer.tasks.to_device import to_device


@dataclass(frozen=True)
class LanguageModelTask:
    """document_mask: keep attention inside a document. seed: of dropout. losses: computes the loss
    of each token from logits and targets.
    """

    device: torch.device
    document_mask: bool
    seed: int
    losses: Callable[[Tensor, Tensor], Tensor] = token_losses

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        step: int | None = None,
        carried: Carried | None = None,
    ) -> Tensor:
        """Return the sum of the losses of all predicted tokens, in nats.

        step: training step, which dropout depends on; None in evaluation. carried: the states that
        the rows continue from, which take over the states after the batch.
        """
        return self.each_loss(model, batch, step, carried).sum()

    def loss_tokens(self, batch: Batch) -> Tensor:
        """Return the number of tokens that have a loss, int64."""
        return self.counted(batch).sum()

    def counted(self, batch: Batch) -> Tensor:
        """Return where `each_loss` has a loss, [batch, length] bool."""
        return batch.targets != IGNORE

    def each_loss(
        self,
        model: nn.Module,
        batch: Batch,
        step: int | None = None,
        carried: Carried | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Return losses in nats, [batch, length], 0 where nothing is predicted.

        step, carried: as for `loss`. wanted: [batch, length] bool, where to compute losses; they
        are 0 elsewhere.
        """
        # Still on the CPU, where carried states are looked up.
        samples = batch.samples
        predicts = batch.targets != IGNORE
        padded = not bool(predicts.all())  # on the CPU, where asking does not wait for the device
        # After `predicts`: what is not wanted is context, and must not become padding.
        if wanted is not None:
            batch = batch._replace(targets=torch.where(wanted, batch.targets, IGNORE))
        real, *fields = to_device(self.device, predicts, *batch)
        batch = Batch(*fields)
        ctx = Context(
            positions=batch.positions,
            documents=batch.documents if self.document_mask else None,
            padding=real if padded else None,
            random=None if step is None else RandomKey(self.seed, step, batch.samples),
        )
        if carried is not None:
            losses, states = model(batch.inputs, ctx, carried.begin(samples), batch.targets)
            carried.advance(samples, states)
            return losses
        # The model computes these itself, a chunk of tokens at a time where it is told to, so that
        # not all logits are in memory together. Other losses take them whole.
        if self.losses is token_losses:
            return model(batch.inputs, ctx, targets=batch.targets)[0]
        return self.losses(model(batch.inputs, ctx)[0], batch.targets)
