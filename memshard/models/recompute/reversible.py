"""Reversible blocks (Gomez et al. 2017; Reformer, Kitaev et al. 2020): backward rebuilds each
block's input from its output, bit for bit.

    y1 = x1 + r(f(x2))    y2 = x2 + r(g(y1))    and back    x2 = y2 - r(g(y1))    x1 = y1 - r(f(x2))

f is the mixer's branch, g that of feedforward and memory, each with its norm and dropout; r rounds
to multiples of 2^-bits. Streams are fp32: sums and differences of such multiples are exact as long
as they stay below 2^(24 - bits), so nothing drifts at any depth.

Backward turns streams and gradients into those of the block before where they lie: it holds four
arrays, and what a branch needs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from memshard.models.block import Block
from memshard.models.context import Context
from memshard.models.memory.table import ValueTable
from memshard.models.mixers.mixer import MixerState
from memshard.models.recompute.replay import Replay

_BITS = 14
_COARSEST = 2


class Grid(nn.Module):
    """Multiples of 1 / scale, and how near the streams have come to where fp32 no longer holds them
    all: 2^24 / scale.

    `scale` is a buffer, 2^14 at first: checkpoints and exports keep it, since it decides the
    model's function.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty(()))
        self.largest: dict[int, Tensor] = {}
        """Of every layer, the largest absolute value of its streams since `clear`; a device scalar.
        """
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Steps of 2^-14: streams up to 1024."""
        self.scale.fill_(2.0**_BITS)

    def round(self, x: Tensor) -> Tensor:
        """x to the grid, in fp32 at least; the gradient passes as it is."""
        return _Round.apply(x, self.scale)

    @property
    def limit(self) -> Tensor:
        """What streams must stay below."""
        return 2.0**24 / self.scale

    def note(self, layer: int, *streams: Tensor) -> None:
        """Remember the largest value. streams: without gradient."""
        if streams[0].numel():
            # Not vector_norm(stream, inf), which takes 12 times as long on CPU.
            found = torch.stack(
                [torch.maximum(-low, high) for low, high in map(torch.aminmax, streams)]
            ).max()
            self.largest[layer] = (
                torch.maximum(self.largest[layer], found) if layer in self.largest else found
            )

    def left_range(self) -> Tensor:
        """Of every layer, whether its streams left the range; not for values that are not finite.
        [layers noted] bool.
        """
        largest = (
            torch.stack(list(self.largest.values())) if self.largest else self.scale.new_empty(0)
        )
        return (largest >= self.limit) & largest.isfinite()

    def used_range(self) -> float:
        """The share of the range that the largest value took; waits for the device."""
        return max((float(value / self.limit) for value in self.largest.values()), default=0.0)

    def coarsen(self) -> None:
        """Four times the range, in steps four times as large; never beyond steps of 2^-2."""
        self.scale.div_(4).clamp_(min=2.0**_COARSEST)

    def clear(self) -> None:
        """Forget the largest values: a step begins."""
        self.largest.clear()


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        rounded = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
        return rounded.round_().mul_(1 / scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def reversible_blocks(
    blocks: Sequence[Block],
    grid: Grid,
    x: Tensor,
    ctx: Context,
    states: Sequence[MixerState] | None = None,
    check: bool = False,
    chunk: int = 0,
) -> tuple[Tensor, Tensor, list[MixerState]]:
    """Both streams after all blocks, each [batch, length, dim], and the mixers' advanced states.

    x: [batch, length, dim], the start of both streams. check: keep a checksum of every block's
    input, and compare it with what backward rebuilds (RuntimeError if they differ). chunk: of how
    many tokens of a sequence feedforward and memory are computed at a time, and differentiated at a
    time; 0 for all. states: without gradient; those that come back have none either. Unless the
    graph is kept, backward overwrites the streams that are returned.
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
    return *_OwnGradients.apply(x1, x2), advanced


def mixer_change(
    block: Block, grid: Grid, x: Tensor, ctx: Context, state: MixerState | None = None
) -> tuple[Tensor, MixerState | None]:
    """f: what the mixer adds to the first stream, given the second."""
    y, state = block.mixer_branch(_as_weights(block.mixer_residual.norm, x), ctx, state)
    return grid.round(y), state


def feedforward_change(
    block: Block, grid: Grid, x: Tensor, ctx: Context, replay: Replay | None = None
) -> Tensor:
    """g: what feedforward and memory add to the second stream, given the first."""
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
    """The second stream after feedforward and memory."""
    y2 = torch.empty_like(x2)
    for piece, part in ctx.split(chunk):
        y2[:, piece] = x2[:, piece] + feedforward_change(block, grid, y1[:, piece], part, replay)
    return y2


def _as_weights(norm: nn.Module, x: Tensor) -> Tensor:
    # Streams are fp32 even where parameters are in half precision.
    assert isinstance(norm.weight, Tensor)
    return x.to(norm.weight.dtype)


def trained_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters that have a gradient, and the anchors of hidden tables. ValueError where a hook on
    one would see it twice.
    """
    found: dict[Tensor, None] = {
        parameter: None for parameter in module.parameters() if parameter.requires_grad
    }
    for parameter in found:
        if parameter._backward_hooks:
            raise ValueError(
                "a parameter of a reversible block has a hook that would run twice: use "
                "register_post_accumulate_grad_hook"
            )
    found |= {
        table.anchor: None
        for table in module.modules()
        if isinstance(table, ValueTable) and table.hidden
    }
    return list(found)


class _Step:
    """What a block's backward pass needs besides parameters, and the context its forward pass ran
    in.

    rebuilt: where each block leaves its input for the one before it.
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
        self.replay = Replay()
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
        """That of the caller's forward pass."""
        return torch.autocast(self.device, self.dtype, self.autocast, cached)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        if self.check:
            self.checksum = _checksum(x1, x2)
        # Compiled code may round otherwise where it expects no backward.
        compiled = self.block.mixer._compiled_call_impl is not None
        # A half precision copy of a weight made here may have no gradient: nobody after us may find
        # it in autocast's cache.
        with torch.set_grad_enabled(compiled), self.autocast_context(cached=False):
            change, self.advanced = mixer_change(
                self.block, self.grid, x2.detach().requires_grad_(compiled), self.ctx, self.state
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
        """Leaves the block's input in `rebuilt`; returns its gradient and those of what is
        trained.
        """
        if self.last and keep_graph:
            y1, y2 = y1.clone(), y2.clone()
        y1, y2 = y1.detach(), y2.detach()
        from_feedforward: list[Tensor | None] = [None] * len(trained)
        with self.replay.repeat():
            for piece, part in self.ctx.split(self.chunk):
                with torch.enable_grad(), self.autocast_context(self.cached):
                    leaf = y1[:, piece].detach().requires_grad_()
                    change = feedforward_change(self.block, self.grid, leaf, part, self.replay)
                y2[:, piece] -= change.detach()
                # Tables keep it until they are updated.
                upstream = d2[:, piece] if self.block.memory is None else d2[:, piece].clone()
                to_y1, *found = torch.autograd.grad(
                    change, [leaf, *trained], upstream, allow_unused=True, retain_graph=keep_graph
                )
                d1[:, piece] += to_y1
                from_feedforward = [
                    _sum(*pair) for pair in zip(from_feedforward, found, strict=True)
                ]
                del change, upstream, to_y1, found
        x2 = y2.requires_grad_()
        with torch.enable_grad(), self.autocast_context(self.cached):
            change, _ = mixer_change(self.block, self.grid, x2, self.ctx, self.state)
        x1 = y1.sub_(change.detach())
        # Of the branch's output only its place in the graph is needed now.
        edge = torch.autograd.graph.get_gradient_edge(change)
        del change
        to_x2, *from_mixer = torch.autograd.grad(edge, [x2, *trained], d1, allow_unused=True)
        x2 = x2.detach()
        if self.checksum is not None and not torch.equal(_checksum(x1, x2), self.checksum):
            raise RuntimeError(
                f"the input of block {self.block.layer} was not rebuilt exactly: something in the "
                "block is not deterministic, "
                f"or its streams left the grid's range of {float(self.grid.limit):g}"
            )
        self.rebuilt[:] = () if self.first else (x1, x2)
        return (
            d1,
            d2.add_(to_x2),
            [_sum(*pair) for pair in zip(from_feedforward, from_mixer, strict=True)],
        )


class _ReversibleBlock(torch.autograd.Function):
    """One block. Parameters are inputs and their gradients outputs, so wrappers see each once, as
    soon as the block is done.
    """

    @staticmethod
    def forward(
        ctx: Any, step: _Step, x1: Tensor, x2: Tensor, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        y1, y2 = step.forward(x1, x2)
        ctx.step, ctx.trained = step, trained
        # Parameters for autograd's check that nobody has changed them in between.
        ctx.save_for_backward(*((y1, y2) if step.last else ()), *trained)
        return y1, y2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        step, saved, keep_graph = (
            ctx.step,
            ctx.saved_tensors,
            torch._C._autograd._get_current_graph_task_keep_graph(),
        )
        y1, y2 = saved[:2] if step.last else step.rebuilt
        d1, d2, gradients = step.backward(y1, y2, d1, d2, ctx.trained, keep_graph)
        if not keep_graph:
            ctx.step = None
        return None, d1, d2, *gradients


class _OwnGradients(torch.autograd.Function):
    """Copies gradients for the last block, which writes to them; autograd's own may be one array
    for both streams, or somebody's.
    """

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return x1.view_as(x1), x2.view_as(x2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor]:
        return d1.clone(), d2.clone()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _checksum(*streams: Tensor) -> Tensor:
    """64 bits of every bit of the streams and its place."""
    whole = torch.cat([stream.flatten() for stream in streams])
    bits = whole.view(torch.int64 if whole.dtype == torch.float64 else torch.int32).long()
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()
