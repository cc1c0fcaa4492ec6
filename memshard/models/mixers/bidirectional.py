"""Attention that sees a whole sequence: an encoder's self-attention, and the cross attention of a
decoder to the encoder's output.
"""

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor

from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.fast_weights.feature_maps import FeatureMap
from memshard.models.fast_weights.sum_rule import read_sum, written_sum
from memshard.models.layers.linear import Projection
from memshard.models.layers.position import rotate
from memshard.models.mixers.mixer import Mixer


@dataclass(frozen=True)
class SourceState:
    """The part of a source that a decoder's layer keeps; None before its first call.

    keys, values: [batch, heads, source length, head dim]; padding: as `Context.source_padding`. For
    linear attention only keys is set: the [batch, heads, features, head dim + 1] of `written_sum`,
    however long the source.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    padding: Tensor | None = None
    length: int = 0


class BidirectionalMixer(Mixer):
    """Multi-head attention of every token to all tokens.

    features: of queries and keys, for linear attention by the sum rule; None for softmax. cross:
    take keys and values from the context's source instead of x. rotary: rotate queries and keys by
    their positions.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        features: FeatureMap | None = None,
        cross: bool = False,
        rotary: bool = False,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads, self.features, self.cross, self.rotary = heads, features, cross, rotary
        self.query = Projection(dim, dim)
        self.key = Projection(dim, dim)
        self.value = Projection(dim, dim)
        self.output = Projection(dim, dim, scale=output_scale)

    @classmethod
    def from_config(
        cls, config: ModelConfig, layer: int, output_scale: float, cross: bool = False
    ) -> Self:
        """Return an encoder layer's mixer, or, with `cross`, how a decoder's layer reads the
        encoder's output: by softmax unless the layer's kind has a sum rule.
        """
        settings, features = config.mixer, None
        if settings.kind_of(layer).whole_text == "sum":
            # As published, linear attention divides by its sum and needs no other normalisation.
            features = FeatureMap(
                settings.features,
                config.dim // settings.heads,
                settings.feature_width,
                settings.feature_norm or "none",
            )
        rotary = config.position == "rotary" and not cross
        return cls(config.dim, settings.heads, features, cross, rotary, output_scale)

    def forward(
        self, x: Tensor, ctx: Context, state: SourceState | None = None
    ) -> tuple[Tensor, SourceState | None]:
        """Return [batch, length, dim], and the state if there was one.

        A new state takes the context's source; later calls need none.
        """
        q = self._split(self.query(x))
        if self.rotary:
            q = rotate(q, ctx.positions)
        if self.features is not None:
            q = self.features(q)
        source = self._remember(x, ctx) if state is None or state.keys is None else state
        assert source.keys is not None
        if self.features is not None:
            y = read_sum(q, source.keys).to(x.dtype)
        else:
            assert source.values is not None
            # [batch, 1, 1, source length]: the same for all heads and queries.
            mask = None if source.padding is None else source.padding[:, None, None]
            y = F.scaled_dot_product_attention(q, source.keys, source.values, attn_mask=mask)
        return self.output(y.transpose(1, 2).flatten(2)), None if state is None else source

    def init_state(self, batch: int, capacity: int) -> SourceState:
        """Return an empty state. ValueError for an encoder, which sees all tokens at once."""
        if not self.cross:
            raise ValueError(
                "an encoder sees all tokens at once: it does not generate (model.encoder_layers)"
            )
        return SourceState()

    @staticmethod
    def reorder(state: SourceState, rows: Tensor) -> SourceState:
        """Return the state whose row i is row rows[i] of this one. rows: [new batch] int64."""
        keys, values, padding = (
            None if field is None else field[rows]
            for field in (state.keys, state.values, state.padding)
        )
        return SourceState(keys, values, padding)

    @staticmethod
    def rollback(state: SourceState, tokens: int) -> SourceState:
        """Return the same state: the source does not change with the target's tokens."""
        return state

    @staticmethod
    def reset(state: SourceState, rows: Tensor) -> SourceState:
        """Return the same state: the source does not change where documents end."""
        return state

    def _remember(self, x: Tensor, ctx: Context) -> SourceState:
        if self.cross and ctx.source is None:
            raise ValueError(
                "a decoder with an encoder needs a source: give the model `source`, or states "
                "that have met theirs"
            )
        source, padding = (ctx.source, ctx.source_padding) if self.cross else (x, ctx.padding)
        k, v = self._split(self.key(source)), self._split(self.value(source))
        if self.rotary:
            k = rotate(k, ctx.positions)
        if self.features is not None:
            # All of the source in one matrix: decoding a token costs the same
            # whatever the source's length.
            return SourceState(written_sum(self.features(k), v, padding))
        if padding is not None:
            # A row without any real token would be all NaN.
            padding = padding | ~padding.any(1, keepdim=True)
        return SourceState(k, v, padding)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
