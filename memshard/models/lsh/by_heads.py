"""A mixer's branch some heads at a time, from norm to output projection: queries, values and
results of all heads are never in memory.

Backward keeps the input alone. For each head it normalises, projects and attends again, a piece of
the sequence after the other where tokens do not meet; the only array of the input's size that it
makes is the input's gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PIECE = 1 << 14  # tokens to normalise and project at a time


@dataclass(frozen=True)
class ByHeads:
    """What to do with `step` of `heads` heads at a time.

    project: from some neighbouring tokens, [batch, tokens, dim], these heads' rows of the weights,
    and which tokens they are, to queries, keys and values, each [batch, step, tokens, head dim]; of
    the first `before` tokens they do not count, unless it is the text that begins. attend: from
    those of a whole sequence, and which heads they are, to results, [batch, step, length, head
    dim].
    """

    heads: int
    step: int
    before: int
    project: Callable[[Tensor, Sequence[Tensor], slice], Sequence[Tensor]]
    attend: Callable[[Sequence[Tensor], slice], Tensor]

    @torch.compiler.disable
    def __call__(
        self, x: Tensor, norm: nn.Module | None, weights: Sequence[Tensor], output: Tensor
    ) -> Tensor:
        """x: [batch, length, dim]; norm: what it goes through first; weights: [head dims, ...]
        each; output: [dim, head dims]. Returns [batch, length, dim], the sum over heads of
        results times output columns.
        """
        trained = () if norm is None else tuple(p for p in norm.parameters() if p.requires_grad)
        return _ByHeads.apply(self, norm, len(weights), x, output, *weights, *trained)

    def spans(self, output: Tensor) -> Iterator[tuple[slice, slice]]:
        """Heads to take together, and their rows of weights, which are columns of the output's."""
        width = output.shape[1] // self.heads
        for first in range(0, self.heads, self.step):
            last = min(first + self.step, self.heads)
            yield slice(first, last), slice(first * width, last * width)


class _ByHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: ByHeads,
        norm: nn.Module | None,
        count: int,
        x: Tensor,
        output: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        device = x.device.type
        ctx.plan, ctx.norm, ctx.count = plan, norm, count
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        ctx.save_for_backward(x, output, *parameters)
        total = None
        for heads, rows in plan.spans(output):
            results = plan.attend(
                _projected(plan, norm, x, [weight[rows] for weight in parameters[:count]]), heads
            )
            for piece in _pieces(x):
                part = F.linear(_joined(results[:, :, piece]), output[:, rows])
                if total is None:
                    total = part.new_zeros(
                        *x.shape[:2],
                        part.shape[-1],
                        dtype=torch.promote_types(part.dtype, torch.float32),
                    )
                total[:, piece] += part
            del results
        assert total is not None
        return total.to(part.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        plan, norm, (x, output, *parameters) = ctx.plan, ctx.norm, ctx.saved_tensors
        whole, trained = parameters[: ctx.count], parameters[ctx.count :]
        d_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        d_output, *d_parameters = (
            torch.zeros_like(parameter) for parameter in (output, *parameters)
        )
        # The cache would keep half precision copies of what is gone.
        with torch.autocast(**ctx.autocast, cache_enabled=False):
            for heads, rows in plan.spans(output):
                weights = [weight[rows] for weight in whole]
                leaves = tuple(map(_leaf, _projected(plan, norm, x, weights)))
                with torch.enable_grad():
                    results = plan.attend(leaves, heads)
                d_results = torch.empty_like(results)
                for piece in _pieces(x):
                    joined, weight = (
                        _leaf(_joined(results.detach()[:, :, piece])),
                        _leaf(output[:, rows]),
                    )
                    with torch.enable_grad():
                        part = F.linear(joined, weight)
                    found, d_weight = torch.autograd.grad(
                        part, (joined, weight), upstream[:, piece]
                    )
                    d_results[:, :, piece] = found.unflatten(-1, (results.shape[1], -1)).transpose(
                        1, 2
                    )
                    d_output[:, rows] += d_weight
                d_leaves = torch.autograd.grad(results, leaves, d_results)
                del results, d_results, leaves, part, found
                for piece, wide, inner in _pieces_behind(x, plan.before):
                    sources = tuple(map(_leaf, (_normalised(norm, x[:, wide]), *weights)))
                    with torch.enable_grad():
                        parts = [
                            part[:, :, inner]
                            for part in plan.project(sources[0], sources[1:], wide)
                        ]
                    found, *of_weights = torch.autograd.grad(
                        parts, sources, [d[:, :, piece] for d in d_leaves]
                    )
                    d_x[:, wide] += found
                    for total, d in zip(d_parameters, of_weights, strict=False):
                        total[rows] += d
                del d_leaves
            for piece in _pieces(x) if norm is not None else ():
                leaf = _leaf(x[:, piece])
                with torch.enable_grad():
                    h = _normalised(norm, leaf)
                found, *of_norm = torch.autograd.grad(
                    h, (leaf, *trained), d_x[:, piece].to(h.dtype)
                )
                d_x[:, piece] = found
                for total, d in zip(d_parameters[len(whole) :], of_norm, strict=True):
                    total += d
        return None, None, None, d_x.to(x.dtype), d_output, *d_parameters


def _projected(
    plan: ByHeads, norm: nn.Module | None, x: Tensor, weights: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Queries, keys and values of some heads and all tokens."""
    whole: list[Tensor] = []
    for piece, wide, inner in _pieces_behind(x, plan.before):
        parts = plan.project(_normalised(norm, x[:, wide]), weights, wide)
        whole = whole or [
            part.new_empty(*part.shape[:2], x.shape[1], part.shape[-1]) for part in parts
        ]
        for to, part in zip(whole, parts, strict=True):
            to[:, :, piece] = part[:, :, inner]
    return whole


def _normalised(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _pieces(x: Tensor) -> Iterator[slice]:
    return (slice(first, first + _PIECE) for first in range(0, x.shape[1], _PIECE))


def _pieces_behind(x: Tensor, before: int) -> Iterator[tuple[slice, slice, slice]]:
    """Pieces, the same with the `before` tokens before them, and where the piece is in that."""
    for piece in _pieces(x):
        first = max(0, piece.start - before)
        yield piece, slice(first, piece.stop), slice(piece.start - first, None)


def _joined(results: Tensor) -> Tensor:
    """[batch, heads, tokens, head dim] to [batch, tokens, head dims]"""
    return results.transpose(1, 2).flatten(2)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
