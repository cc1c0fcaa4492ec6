"""The block of a decoder that reads an encoder's output between its mixer and its feedforward
(Vaswani et al. 2017, section 3.1).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memshard.models.block import Block
from memshard.models.context import Context
from memshard.models.layers.residual import Residual
from memshard.models.mixers.bidirectional import BidirectionalMixer, SourceState
from memshard.models.mixers.mixer import MixerState
from memshard.models.recompute.replay import Replay

# After the mixer's 0 and the feedforward's 1 (block.py): part of the key of a dropout mask.
_CROSS_BRANCH = 2


@dataclass(frozen=True)
class DecoderState:
    """The states of a decoder block: of its mixer, and of its cross attention."""

    mixer: Any
    source: SourceState

    @property
    def length(self) -> int:
        """Number of tokens seen."""
        return int(self.mixer.length)


class DecoderBlock(Block):
    """A block with a third branch, `cross`, which has a separate residual."""

    def __init__(self, cross: BidirectionalMixer, cross_residual: Residual, *block: Any) -> None:
        super().__init__(*block)
        self.cross, self.cross_residual = cross, cross_residual

    def after_mixer(
        self, x: Tensor, ctx: Context, state: MixerState | None = None, replay: Replay | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """Return the stream after mixer and cross attention, and their advanced states."""
        assert state is None or isinstance(state, DecoderState)
        x, mixer = super().after_mixer(x, ctx, None if state is None else state.mixer, replay)
        y, source = self.cross(
            self.cross_residual.before(x), ctx, None if state is None else state.source
        )
        x = self.cross_residual.join(x, self._dropout(y, ctx, _CROSS_BRANCH))
        return x, None if mixer is None or source is None else DecoderState(mixer, source)

    def init_state(self, batch: int, capacity: int) -> DecoderState:
        """Return empty states, as a mixer's `init_state` does."""
        return DecoderState(
            self.mixer.init_state(batch, capacity), self.cross.init_state(batch, capacity)
        )

    def reorder(self, state: MixerState, rows: Tensor) -> DecoderState:
        """Return the states of other rows, as a mixer's `reorder` does."""
        assert isinstance(state, DecoderState)
        return DecoderState(
            self.mixer.reorder(state.mixer, rows), self.cross.reorder(state.source, rows)
        )
