"""The three-slot block: a mixer, a feedforward or memory (or both), and their residuals."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from memshard.models.context import Context
from memshard.models.layers.convolution import RecentRows
from memshard.models.layers.linear import cast_once
from memshard.models.layers.residual import Residual
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.mixers.mixer import Mixer, MixerState
from memshard.models.ngram.kinds import Place
from memshard.models.ngram.memory import NgramMemory
from memshard.models.random import dropout
from memshard.models.recompute.replay import Replay

# Parts of the keys of dropout masks: other numbers would draw other masks.
_MIXER_BRANCH, _FEEDFORWARD_BRANCH = 0, 1


@dataclass(frozen=True)
class NgramState:
    """The states of a block with an n-gram memory: of its mixer, and of that convolution."""

    mixer: Any
    ngram: RecentRows

    @property
    def length(self) -> int:
        """Number of tokens seen."""
        return int(self.mixer.length)


class Block(nn.Module):
    """One layer. Where both a feedforward and a memory are given, their outputs are added.

    ngram: a memory addressed by tokens. place: where it is, as `NgramConfig.place` says.
    """

    def __init__(
        self,
        layer: int,
        mixer: Mixer,
        feedforward: nn.Module | None,
        memory: ProductKeyMemory | None,
        residuals: tuple[Residual, Residual],
        dropout_rate: float,
        ngram: NgramMemory | None = None,
        place: Place = "mixer",
    ) -> None:
        super().__init__()
        self.layer = layer
        self.mixer = mixer
        self.feedforward = feedforward
        self.memory = memory
        self.mixer_residual, self.feedforward_residual = residuals
        self.dropout_rate = dropout_rate
        self.ngram = ngram
        self.place: Place | None = None if ngram is None else place

    @property
    def _ngram_beside(self) -> bool:
        return self.place in ("feedforward", "replace")

    @property
    def has_table(self) -> bool:
        """Whether the block reads a value table."""
        return self.memory is not None or self.ngram is not None

    def forward(
        self, x: Tensor, ctx: Context, state: MixerState | None = None, replay: Replay | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """Return the stream after both halves, and the mixer's advanced state.

        x: [batch, length, dim]. replay: of a pass that backward repeats.
        """
        # Two methods, because selective checkpointing repeats the second half alone.
        x, state = self.after_mixer(x, ctx, state, replay)
        return self.after_feedforward(x, ctx, replay), state

    def after_mixer(
        self, x: Tensor, ctx: Context, state: MixerState | None = None, replay: Replay | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """Return the stream after the first half, and the mixer's advanced state."""
        change, state = self.mixer_branch(x, ctx, state, replay)
        return self.mixer_residual.join(x, change), state

    def after_feedforward(self, x: Tensor, ctx: Context, replay: Replay | None = None) -> Tensor:
        """Return the stream after the second half; a program may have none."""
        if self.feedforward is None and self.memory is None and not self._ngram_beside:
            return x
        return self.feedforward_residual.join(x, self.feedforward_branch(x, ctx, replay))

    def mixer_branch(
        self, x: Tensor, ctx: Context, state: MixerState | None = None, replay: Replay | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """Return what the mixer adds to x, norm and dropout included, and its advanced state.

        An n-gram memory in front of it adds n(x) first: the sum n(x) + f(x + n(x)) is a branch like
        any other, which reversible streams need.
        """
        if self.ngram is None or self.place != "mixer":
            return self._mixed(x, ctx, state, replay)
        mixer, recent = (
            (state.mixer, state.ngram) if isinstance(state, NgramState) else (state, None)
        )
        added, recent = self.ngram(x, ctx.local, recent, replay)
        y, mixer = self._mixed(x + added, ctx, mixer, replay)
        if self.mixer_residual.kind != "whole":
            y = added + y
        return y, mixer if mixer is None or recent is None else NgramState(mixer, recent)

    def _mixed(
        self, x: Tensor, ctx: Context, state: MixerState | None, replay: Replay | None
    ) -> tuple[Tensor, MixerState | None]:
        # With sequence sharding (local_part) tokens are normalised before they are gathered, so the
        # mixer cannot apply the norm itself.
        if self.mixer.applies_norm and state is None and ctx.local_part is None:
            y, state = self.mixer(x, ctx, None, norm=self.mixer_residual.norm_before)
        else:
            h = self.mixer_residual.before(x)
            # A program casts what it multiplies and computes all else in fp32.
            h = h if self.mixer_residual.kind == "whole" else cast_once(h)
            if self.ngram is not None and self.place == "values":
                ctx = replace(ctx, values=self.ngram(h, ctx.local, None, replay)[0])
            y, state = self.mixer(h, ctx, state)
        return self._dropout(self.mixer_residual.after(y), ctx, _MIXER_BRANCH), state

    def feedforward_branch(self, x: Tensor, ctx: Context, replay: Replay | None = None) -> Tensor:
        """Return what feedforward and memory add to x, norm and dropout included."""
        h = self.feedforward_residual.before(x)
        outputs = [] if self.feedforward is None else [self.feedforward(h)]
        if self.memory is not None:
            outputs.append(self.memory(h, ctx.local.padding, replay))
        if self.ngram is not None and self._ngram_beside:
            outputs.append(self.ngram(h, ctx.local, None, replay)[0])
        # From outputs[0] and not from sum's 0, which would cost another pass over the activations.
        y = self.feedforward_residual.after(sum(outputs[1:], outputs[0]))
        return self._dropout(y, ctx, _FEEDFORWARD_BRANCH)

    def init_state(self, batch: int, capacity: int) -> MixerState:
        """Return an empty state, as a mixer's `init_state` does."""
        mixer = self.mixer.init_state(batch, capacity)
        recent = None if self.ngram is None else self.ngram.init_state(batch)
        return mixer if recent is None else NgramState(mixer, recent)

    def reorder(self, state: MixerState, rows: Tensor) -> MixerState:
        """Return the state of other rows, as a mixer's `reorder` does."""
        if isinstance(state, NgramState):
            return NgramState(self.mixer.reorder(state.mixer, rows), state.ngram.reorder(rows))
        return self.mixer.reorder(state, rows)

    def rollback(self, state: MixerState, tokens: int) -> MixerState:
        """Return the state before its last tokens, as a mixer's `rollback` does."""
        if isinstance(state, NgramState):
            return NgramState(
                self.mixer.rollback(state.mixer, tokens), state.ngram.rollback(tokens)
            )
        return self.mixer.rollback(state, tokens)

    def reset(self, state: MixerState, rows: Tensor) -> MixerState:
        """Forget everything in the given rows, as a mixer's `reset` does."""
        if isinstance(state, NgramState):
            return NgramState(self.mixer.reset(state.mixer, rows), state.ngram.reset(rows))
        return self.mixer.reset(state, rows)

    def _dropout(self, y: Tensor, ctx: Context, branch: int) -> Tensor:
        if not self.training or not self.dropout_rate or ctx.random is None:
            return y
        return dropout(y, self.dropout_rate, ctx.random, ctx.local.positions, self.layer, branch)
