"""An encoder and a decoder that reads its output: translation."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.decoder_block import DecoderBlock
from memshard.models.layers.linear import cast_once
from memshard.models.layers.norm import build_norm
from memshard.models.mixers.mixer import MixerState
from memshard.models.recompute.checkpointing import run_block
from memshard.models.transformer import Transformer


class EncoderDecoder(Transformer):
    """An encoder of the first `config.encoder_layers` blocks, and a decoder of the others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.encoder_norm = (
            nn.Identity() if config.residual == "post" else build_norm(config.norm, config.dim)
        )

    def forward(
        self,
        tokens: Tensor,
        ctx: Context | None = None,
        states: Sequence[MixerState] | None = None,
        targets: Tensor | None = None,
        source: tuple[Tensor, Context] | None = None,
    ) -> tuple[Tensor, list[MixerState] | None]:
        """Do what `Transformer.forward` does, with a decoder that reads `source`: tokens, [batch,
        source length] int64, and their context.

        states: of the decoder's blocks. The first call with new states needs the source; later ones
        do not.
        """
        ctx = ctx or Context.of(tokens, states[0].length if states else 0)
        if source is not None:
            # Once a text: later calls have keys and values in their states.
            read = cast_once(self.encode(*source))
            ctx = replace(ctx, source=read, source_padding=source[1].padding)
        return super().forward(tokens, ctx, states, targets)

    def encode(self, tokens: Tensor, ctx: Context) -> Tensor:
        """Return the encoder's output, [batch, source length, dim]."""
        # Another branch, so that source and target draw different dropout masks.
        x = self._embed(tokens, ctx, branch=1)
        checkpointing = self.recompute.checkpointing if torch.is_grad_enabled() else "none"
        for block in self.blocks[: self.config.encoder_layers]:
            x, _ = run_block(checkpointing, block, x, ctx, None, self.recompute.chunk)
        return self.encoder_norm(x)

    @property
    def stack(self) -> list[DecoderBlock]:
        """The decoder's blocks."""
        return [block for block in self.blocks if isinstance(block, DecoderBlock)]


def build_model(config: ModelConfig) -> Transformer:
    """Return the model of the settings. `vocab_size` must be set, as for `Transformer`."""
    return EncoderDecoder(config) if config.translates else Transformer(config)
