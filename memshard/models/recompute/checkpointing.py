"""Activation checkpointing: keep less in forward and compute it again in backward.

Results are bit for bit those without it.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memshard.models.block import Block
from memshard.models.context import Context
from memshard.models.mixers.mixer import MixerState
from memshard.models.recompute.replay import Replay

Checkpointing = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class Recompute:
    """The parts of a model that backward computes again to save memory; losses and gradients stay
    the same.

    checkpointing: what ordinary blocks recompute, see `run_block`; reversible blocks recompute
    everything as they are. chunk: tokens of a sequence that feedforwards, memories and the head
    take at a time; 0 takes all. segments: a training pass takes a sequence in so many parts, one
    after the other, with the mixers' states between them. check_inversion: compare the input that
    each reversible block reconstructs with a checksum of the true one.
    """

    checkpointing: Checkpointing = "none"
    chunk: int = 0
    segments: int = 1
    check_inversion: bool = False


def run_block(
    kind: Checkpointing,
    block: Block,
    x: Tensor,
    ctx: Context,
    state: MixerState | None = None,
    chunk: int = 0,
    replay: Replay | None = None,
) -> tuple[Tensor, MixerState | None]:
    """Run a block; return its output and the mixer's advanced state.

    kind: what backward computes again. "full": the block, of which only the input is kept.
    "selective": its feedforward half up to the last matrix, which keeps two thirds of a block's
    activations and costs a ninth of a step's multiplications; fused attention keeps no scores that
    would be worth it. chunk: compute the feedforward half for so many tokens of a sequence at a
    time, which backward repeats one by one; 0 for all at once. replay: that of a whole pass which
    backward repeats; kind is then "none" and chunk 0.
    """
    if chunk and chunk < ctx.local.positions.shape[1]:
        if kind == "full":
            x, state = checkpointed(block.after_mixer, x, ctx, state)
        else:
            x, state = block.after_mixer(x, ctx, state)
        # A checkpoint for each chunk, so that backward has the activations of one at a time.
        parts = zip(x.split(chunk, 1), ctx.split(chunk), strict=True)
        fed = (
            partial(checkpointed, block.after_feedforward)
            if torch.is_grad_enabled()
            else block.after_feedforward
        )
        return torch.cat([fed(part, facts) for part, (_, facts) in parts], 1), state
    whole: tuple[Tensor, MixerState | None]
    if kind == "none":
        whole = block(x, ctx, state, replay)
        return whole
    if kind == "full":
        whole = checkpointed(block, x, ctx, state)
        return whole
    x, state = block.after_mixer(x, ctx, state)
    return checkpointed(block.after_feedforward, x, ctx), state


def checkpointed(function: Any, *inputs: Any) -> Any:
    """Call function(*inputs, replay=...) and keep only its inputs; backward calls it again."""
    replay = Replay()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), replay.repeat()

    # Draws are counter-based, so no generator's state must be restored for the second run.
    return checkpoint(
        function,
        *inputs,
        replay=replay,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
    )
