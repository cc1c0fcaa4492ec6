"""Reversible blocks (Gomez et al. 2017; Reformer, Kitaev et al. 2020).

Backward reconstructs each block's input from its output, bit for bit, so
forward keeps no activations:

    y1 = x1 + r(f(x2))    y2 = x2 + r(g(y1))    and back    x2 = y2 - r(g(y1))    x1 = y1 - r(f(x2))

f is the mixer's branch, g that of feedforward and memory, each with its norm and dropout; r rounds
to the grid of grid.py, on which sums and differences are exact, so nothing drifts at any depth.

Backward reconstructs each block's inputs and gradients in place, so only four arrays are alive at
any time, and what one branch needs.

Autocast's cache. Under autocast, a matrix product casts its fp32 weight to half precision, and
autocast keeps the cast copy so that the next product with this weight need not cast again. We run
every branch twice: in forward without gradients, in backward with them. A copy made by the first
run is not connected to autograd. If the second run, or a later layer that shares the weight, found
it in the cache, the weight would silently get no gradient: with a weight W used by a reversible
block and by the head, W's gradient from the head would be missing. So the first run has its cache
switched off, and only runs with gradients use it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from memshard.models import compat
from memshard.models.block import Block
from memshard.models.context import Context
from memshard.models.memory.hidden import HideableTable
from memshard.models.mixers.mixer import MixerState
from memshard.models.once import Saved, differentiable_once
from memshard.models.recompute.grid import Grid
from memshard.models.recompute.replay import Replay


def reversible_blocks(
    blocks: Sequence[Block],
    grid: Grid,
    x: Tensor,
    ctx: Context,
    states: Sequence[MixerState] | None = None,
    check: bool = False,
    chunk: int = 0,
) -> tuple[Tensor, Tensor, list[MixerState]]:
    """Return both streams after all blocks, each [batch, length, dim], and the mixers' states.

    x: [batch, length, dim], the start of both streams. check: keep a checksum of every block's
    input and compare it with the input that backward reconstructs (RuntimeError if they differ).
    chunk: the number of tokens of a sequence that feedforward and memory compute, and
    differentiate, at a time; 0 for all. states: without gradient; those that are returned have none
    either. Unless the graph is kept, backward overwrites the streams that are returned.
    """
    # Sums and differences never give -0, so a stream that begins with it would come back as 0.
    x1 = x2 = grid.round(x) + 0.0
    del x
    advanced = []
    if not torch.is_grad_enabled():
        for layer, block in enumerate(blocks):
            change, state = mixer_change(block, grid, x2, ctx, states[layer] if states else None)
            x1 = x1 + change
            x2 = _fed(block, grid, x1, x2, ctx, chunk)
            if state is not None:
                advanced.append(state)
        return x1, x2, advanced
    rebuilt: list[Tensor] = []
    for layer, block in enumerate(blocks):
        step = _Step(
            block,
            grid,
            ctx,
            rebuilt,
            first=block is blocks[0],
            last=block is blocks[-1],
            check=check,
            chunk=chunk,
        )
        step.state = states[layer] if states else None
        x1, x2 = _ReversibleBlock.apply(step, x1, x2, *trained_tensors(block))
        if step.advanced is not None:
            advanced.append(step.advanced)
    return *_CopyGradients.apply(x1, x2), advanced


def mixer_change(
    block: Block,
    grid: Grid,
    x: Tensor,
    ctx: Context,
    state: MixerState | None = None,
    replay: Replay | None = None,
) -> tuple[Tensor, MixerState | None]:
    """Return f(x), which the mixer adds to the first stream, given the second."""
    y, state = block.mixer_branch(_as_weights(block.mixer_residual.norm, x), ctx, state, replay)
    return grid.round(y), state


def feedforward_change(
    block: Block, grid: Grid, x: Tensor, ctx: Context, replay: Replay | None = None
) -> Tensor:
    """Return g(x), which feedforward and memory add to the second stream, given the first."""
    return grid.round(
        block.feedforward_branch(_as_weights(block.feedforward_residual.norm, x), ctx, replay)
    )


def _fed(
    block: Block,
    grid: Grid,
    y1: Tensor,
    x2: Tensor,
    ctx: Context,
    chunk: int,
    replay: Replay | None = None,
) -> Tensor:
    """Return the second stream after feedforward and memory."""
    y2 = torch.empty_like(x2)
    for tokens, part in ctx.split(chunk):
        y2[:, tokens] = x2[:, tokens] + feedforward_change(block, grid, y1[:, tokens], part, replay)
    return y2


def _as_weights(norm: nn.Module, x: Tensor) -> Tensor:
    # Streams are fp32 even where parameters are in half precision.
    assert isinstance(norm.weight, Tensor)
    return x.to(norm.weight.dtype)


def trained_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters that need gradients, and the anchors of hidden tables.

    ValueError if a parameter has a hook, which would see a gradient of each run.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter._backward_hooks:
            raise ValueError(
                "a parameter of a reversible block has a hook that would run twice: use "
                "register_post_accumulate_grad_hook"
            )
    return parameters + [
        table.anchor
        for table in module.modules()
        if isinstance(table, HideableTable) and table.hidden and table.anchor.requires_grad
    ]


class _Step:
    """One block's forward and backward pass, and what the second needs from the first.

    rebuilt: list in which each block leaves its reconstructed input for the one before it.
    """

    def __init__(
        self,
        block: Block,
        grid: Grid,
        ctx: Context,
        rebuilt: list[Tensor],
        first: bool,
        last: bool,
        check: bool,
        chunk: int,
    ) -> None:
        self.block, self.grid, self.ctx, self.rebuilt = block, grid, ctx, rebuilt
        self.first, self.last, self.check, self.chunk = first, last, check, chunk
        # Backward repeats the halves in the other order.
        self.mixer_replay, self.replay = Replay(), Replay()
        self.state: MixerState | None = None
        self.advanced: MixerState | None = None
        self.device = ctx.positions.device.type
        self.dtype, self.autocast = (
            torch.get_autocast_dtype(self.device),
            torch.is_autocast_enabled(self.device),
        )
        self.cached = torch.is_autocast_cache_enabled()
        self.checksum: Tensor | None = None

    def autocast_context(self, cached: bool) -> AbstractContextManager[object]:
        """Return the autocast context of the caller's forward pass."""
        return torch.autocast(self.device, self.dtype, self.autocast, cached)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        if self.check:
            self.checksum = _checksum(x1, x2)
        # Compiled code may round differently when it expects no backward.
        compiled = compat.is_compiled(self.block.mixer)
        # No autocast cache: see the paragraph at the top of this file.
        with torch.set_grad_enabled(compiled), self.autocast_context(cached=False):
            change, self.advanced = mixer_change(
                self.block,
                self.grid,
                x2.detach().requires_grad_(compiled),
                self.ctx,
                self.state,
                self.mixer_replay,
            )
            y1 = x1 + change.detach()
            del change
            leaf = y1.detach().requires_grad_(compiled)
            y2 = _fed(self.block, self.grid, leaf, x2, self.ctx, self.chunk, self.replay).detach()
        if self.block.training:
            self.grid.note(self.block.layer, y1, y2)
        return y1, y2

    def backward(
        self,
        y1: Tensor,
        y2: Tensor,
        d1: Tensor,
        d2: Tensor,
        trained: Sequence[Tensor],
        keep_graph: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Leave the block's input in `rebuilt`; return its gradients and those of `trained`."""
        if self.last and keep_graph:
            y1, y2 = y1.clone(), y2.clone()
        y1, y2 = y1.detach(), y2.detach()
        from_feedforward: list[Tensor | None] = [None] * len(trained)
        with self.replay.repeat():
            for tokens, part in self.ctx.split(self.chunk):
                with torch.enable_grad(), self.autocast_context(self.cached):
                    leaf = y1[:, tokens].detach().requires_grad_()
                    change = feedforward_change(self.block, self.grid, leaf, part, self.replay)
                # y2 turns into x2 in place, chunk by chunk: exact, since both are on the grid.
                y2[:, tokens] -= change.detach()
                # Tables hold on to `upstream` until the optimizer step, and d2 is modified in place
                # below: clone.
                upstream = d2[:, tokens].clone() if self.block.has_table else d2[:, tokens]
                to_y1, *gradients = torch.autograd.grad(
                    change, [leaf, *trained], upstream, allow_unused=True, retain_graph=keep_graph
                )
                d1[:, tokens] += to_y1
                from_feedforward = [
                    _sum(*pair) for pair in zip(from_feedforward, gradients, strict=True)
                ]
                del change, upstream, to_y1, gradients
        x2 = y2.requires_grad_()
        with (
            self.mixer_replay.repeat(),
            torch.enable_grad(),
            self.autocast_context(self.cached),
        ):
            change, _ = mixer_change(
                self.block, self.grid, x2, self.ctx, self.state, self.mixer_replay
            )
        x1 = y1.sub_(change.detach())
        # Only the output's place in the graph is needed now, not its values.
        edge = torch.autograd.graph.get_gradient_edge(change)
        del change
        to_x2, *from_mixer = torch.autograd.grad(
            edge,
            [x2, *trained],
            d1.clone() if self.block.has_table else d1,
            allow_unused=True,
            retain_graph=keep_graph,
        )
        x2 = x2.detach()
        if self.checksum is not None and not torch.equal(_checksum(x1, x2), self.checksum):
            raise RuntimeError(
                f"the input of block {self.block.layer} was not rebuilt exactly: something in the "
                "block is not deterministic, "
                f"or its streams left the grid's range of {float(self.grid.limit):g}"
            )
        # The block before takes its output from here; nobody else refers to it, so
        # it may be overwritten.
        self.rebuilt[:] = () if self.first else (x1, x2)
        return (
            d1,
            d2.add_(to_x2),
            [_sum(*pair) for pair in zip(from_feedforward, from_mixer, strict=True)],
        )


class _ReversibleBlock(torch.autograd.Function):
    """Run one block.

    Parameters are inputs and their gradients outputs, so wrappers such as DDP see each gradient
    once, as soon as the block is done.
    """

    @staticmethod
    def forward(
        ctx: Any, step: _Step, x1: Tensor, x2: Tensor, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        y1, y2 = step.forward(x1, x2)
        ctx.step, ctx.trained = step, trained
        # Parameters are saved for autograd's check that nobody has changed them in between.
        ctx.save_for_backward(*((y1, y2) if step.last else ()), *trained)
        return y1, y2

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        step, keep_graph = ctx.step, compat.backward_keeps_graph()
        y1, y2 = saved[:2] if step.last else step.rebuilt
        # Asked here, since the passes inside name all they are given. A table would learn from it.
        wanted = [compat.backward_wants(tensor) for tensor in ctx.trained]
        d1, d2, gradients = step.backward(
            y1, y2, d1, d2, list(compress(ctx.trained, wanted)), keep_graph
        )
        if not keep_graph:
            ctx.step = None
        rest = iter(gradients)
        return None, d1, d2, *(next(rest) if asked else None for asked in wanted)


class _CopyGradients(torch.autograd.Function):
    """Copy the gradients for the last block, which writes to them.

    Those of autograd may be one array for both streams, or belong to someone else.
    """

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return x1.view_as(x1), x2.view_as(x2)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor]:
        return d1.clone(), d2.clone()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _checksum(*streams: Tensor) -> Tensor:
    """Return 64 bits that depend on every bit of the streams and its position."""
    whole = torch.cat([stream.flatten() for stream in streams])
    bits = whole.view(torch.int64 if whole.dtype == torch.float64 else torch.int32).long()
    # Odd factors are invertible modulo 2^64: any change of one number changes the sum, and so does
    # swapping two different ones.
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()
