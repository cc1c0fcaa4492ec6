"""The three-slot block: a mixer, a feedforward or memory (or both), and their residuals."""

from torch import Tensor, nn

from memshard.models.context import Context
from memshard.models.layers.residual import Residual
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.mixers.mixer import Mixer, MixerState
from memshard.models.random import dropout
from memshard.models.recompute.replay import Replay

# Parts of the keys of dropout masks: other numbers would draw other masks.
_MIXER_BRANCH, _FEEDFORWARD_BRANCH = 0, 1


class Block(nn.Module):
    """One layer. Where both a feedforward and a memory are given, their outputs are added."""

    def __init__(
        self,
        layer: int,
        mixer: Mixer,
        feedforward: nn.Module | None,
        memory: ProductKeyMemory | None,
        residuals: tuple[Residual, Residual],
        dropout_rate: float,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.mixer = mixer
        self.feedforward = feedforward
        self.memory = memory
        self.mixer_residual, self.feedforward_residual = residuals
        self.dropout_rate = dropout_rate

    def forward(
        self, x: Tensor, ctx: Context, state: MixerState | None = None, replay: Replay | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """Return the stream after both halves, and the mixer's advanced state.

        x: [batch, length, dim]. replay: of a pass that backward repeats.
        """
        # Two methods, because selective checkpointing repeats the second half alone.
        x, state = self.after_mixer(x, ctx, state)
        return self.after_feedforward(x, ctx, replay), state

    def after_mixer(
        self, x: Tensor, ctx: Context, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """Return the stream after the first half, and the mixer's advanced state."""
        change, state = self.mixer_branch(x, ctx, state)
        return self.mixer_residual.join(x, change), state

    def after_feedforward(self, x: Tensor, ctx: Context, replay: Replay | None = None) -> Tensor:
        """Return the stream after the second half; a program may have none."""
        if self.feedforward is None and self.memory is None:
            return x
        return self.feedforward_residual.join(x, self.feedforward_branch(x, ctx, replay))

    def mixer_branch(
        self, x: Tensor, ctx: Context, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """Return what the mixer adds to x, norm and dropout included, and its advanced state."""
        # With sequence sharding (local_part) tokens are normalised before they are gathered, so the
        # mixer cannot apply the norm itself.
        if self.mixer.applies_norm and state is None and ctx.local_part is None:
            y, state = self.mixer(x, ctx, None, norm=self.mixer_residual.norm_before)
        else:
            y, state = self.mixer(self.mixer_residual.before(x), ctx, state)
        return self._dropout(self.mixer_residual.after(y), ctx, _MIXER_BRANCH), state

    def feedforward_branch(self, x: Tensor, ctx: Context, replay: Replay | None = None) -> Tensor:
        """Return what feedforward and memory add to x, norm and dropout included."""
        h = self.feedforward_residual.before(x)
        outputs = [] if self.feedforward is None else [self.feedforward(h)]
        if self.memory is not None:
            outputs.append(self.memory(h, ctx.local.padding, replay))
        # From outputs[0] and not from sum's 0, which would cost another pass over the activations.
        y = self.feedforward_residual.after(sum(outputs[1:], outputs[0]))
        return self._dropout(y, ctx, _FEEDFORWARD_BRANCH)

    def _dropout(self, y: Tensor, ctx: Context, branch: int) -> Tensor:
        if not self.training or not self.dropout_rate or ctx.random is None:
            return y
        return dropout(y, self.dropout_rate, ctx.random, ctx.local.positions, self.layer, branch)
