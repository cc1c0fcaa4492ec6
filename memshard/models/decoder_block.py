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
from memshard.models.mixers.build import MixerState

_CROSS_BRANCH = 2


@dataclass(frozen=True)
class DecoderState:
    """own: of the mixer; source: of the reading of the encoder's output."""

    own: Any
    source: SourceState

    @property
    def length(self) -> int:
        """Tokens seen."""
        return int(self.own.length)


class DecoderBlock(Block):
    """A block with one more branch, `cross`, of its own residual."""

    def __init__(self, cross: BidirectionalMixer, cross_residual: Residual, *block: Any) -> None:
        super().__init__(*block)
        self.cross, self.cross_residual = cross, cross_residual

    def mixed(
        self, x: Tensor, ctx: Context, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """x after mixer and cross attention, and their advanced states."""
        assert state is None or isinstance(state, DecoderState)
        x, own = super().mixed(x, ctx, None if state is None else state.own)
        y, source = self.cross(
            self.cross_residual.before(x), ctx, None if state is None else state.source
        )
        x = self.cross_residual.join(x, self._dropout(y, ctx, _CROSS_BRANCH))
        return x, None if own is None or source is None else DecoderState(own, source)

    def init_state(self, batch: int, capacity: int) -> DecoderState:
        """As a mixer's."""
        return DecoderState(
            self.mixer.init_state(batch, capacity), self.cross.init_state(batch, capacity)
        )

    def reorder(self, state: MixerState, rows: Tensor) -> DecoderState:
        """As a mixer's."""
        assert isinstance(state, DecoderState)
        return DecoderState(
            self.mixer.reorder(state.own, rows), self.cross.reorder(state.source, rows)
        )
