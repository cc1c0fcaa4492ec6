"""The three-slot block: a mixer, a feedforward (or memory, or both), and the residual that joins
them.
"""

from torch import Tensor, nn

from memshard.models.context import Context
from memshard.models.layers.residual import Residual
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.mixers.build import Mixer, MixerState
from memshard.models.mixers.lsh import LSHMixer
from memshard.models.program.mixer import ProgramMixer
from memshard.models.random import dropout
from memshard.models.recompute.replay import Replay

_MIXER_BRANCH, _FEEDFORWARD_BRANCH = 0, 1


class Block(nn.Module):
    """One layer. Where both a feedforward and a memory are given, their outputs are added."""

    def __init__(
        self,
        layer: int,
        mixer: Mixer | ProgramMixer,
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
        """x: [batch, length, dim]; returns the same shape and the mixer's advanced state. replay:
        of a pass that backward repeats.
        """
        x, state = self.mixed(x, ctx, state)
        return self.fed(x, ctx, replay), state

    def mixed(
        self, x: Tensor, ctx: Context, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """The first half: x after the mixer, and its advanced state."""
        change, state = self.mix(x, ctx, state)
        return self.mixer_residual.join(x, change), state

    def fed(self, x: Tensor, ctx: Context, replay: Replay | None = None) -> Tensor:
        """The second half: x after feedforward and memory; a program may do without."""
        if self.feedforward is None and self.memory is None:
            return x
        return self.feedforward_residual.join(x, self.feed(x, ctx, replay))

    def mix(
        self, x: Tensor, ctx: Context, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """What the mixer adds to x, norm and dropout included, and the advanced state."""
        mixer = self.mixer
        # Ranks that gather a sequence send normalised tokens.
        if (
            isinstance(mixer, LSHMixer)
            and mixer.heads_at_once
            and state is None
            and ctx.part is None
        ):
            y, state = mixer(x, ctx, None, self.mixer_residual.first)
        else:
            y, state = mixer(self.mixer_residual.before(x), ctx, state)
        return self._dropout(self.mixer_residual.after(y), ctx, _MIXER_BRANCH), state

    def feed(self, x: Tensor, ctx: Context, replay: Replay | None = None) -> Tensor:
        """What feedforward and memory add to x, norm and dropout included."""
        h = self.feedforward_residual.before(x)
        parts = [] if self.feedforward is None else [self.feedforward(h)]
        if self.memory is not None:
            parts.append(self.memory(h, ctx.own.padding, replay))
        y = self.feedforward_residual.after(sum(parts[1:], parts[0]))
        return self._dropout(y, ctx, _FEEDFORWARD_BRANCH)

    def _dropout(self, y: Tensor, ctx: Context, branch: int) -> Tensor:
        if not self.training or not self.dropout_rate or ctx.random is None:
            return y
        return dropout(y, self.dropout_rate, ctx.random, ctx.own.positions, self.layer, branch)
