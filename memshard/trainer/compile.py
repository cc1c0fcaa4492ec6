"""torch.compile, layer by layer."""

from memshard.models.decoder_block import DecoderBlock
from memshard.models.transformer import Transformer


def compile_layers(model: Transformer) -> None:
    """Compile each mixer and feedforward in place, at its first use; names and parameters stay.

    Memory layers stay as they are: their reads are custom functions with collected gradients,
    kernels of their own and exchanges between ranks. So do whole blocks: their dropout draws from
    64-bit keys of the step's number, which the compiler either takes for a new program in every
    step or cannot print (an OverflowError in torch 2.13).
    """
    for block in model.blocks:
        block.mixer.compile()
        if isinstance(block, DecoderBlock):
            block.cross.compile()
        if block.feedforward is not None:
            block.feedforward.compile()
