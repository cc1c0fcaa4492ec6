"""A mixer's branch a few heads at a time, from norm to output projection, so that queries, values
and results of all heads are never in memory together.

Backward keeps only the input. For each head it normalises, projects and attends again, span by span
wherever tokens do not interact; the only array of the input's size that it allocates
is the input's gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.once import Saved, differentiable_once

SPAN = 1 << 14  # tokens to normalise and project at a time


@dataclass(frozen=True)
class ByHeads:
    """Attention that processes `step` of `heads` heads at a time.

    project: takes consecutive tokens, [batch, tokens, dim], the heads' rows of the weights, and
    which tokens these are; returns queries, keys and values, each [batch, step, tokens, head dim].
    The first `before` tokens only serve as context (for convolutions), except where the text
    begins. attend: takes queries, keys and values of a whole sequence, and which heads these are;
    returns [batch, step, length, head dim].
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
        """Return [batch, length, dim], the sum over heads of results times output columns.

        x: [batch, length, dim]; norm: applied to x first; weights: [head dims, ...] each; output:
        [dim, head dims].
        """
        trained = () if norm is None else tuple(p for p in norm.parameters() if p.requires_grad)
        return _ByHeads.apply(self, norm, len(weights), x, output, *weights, *trained)

    def spans(self, output: Tensor) -> Iterator[tuple[slice, slice]]:
        """Yield the heads to process together, and their rows of the weights."""
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
            for span in _spans(x):
                part = F.linear(_joined(results[:, :, span]), output[:, rows])
                if total is None:
                    total = part.new_zeros(
                        *x.shape[:2],
                        part.shape[-1],
                        dtype=torch.promote_types(part.dtype, torch.float32),
                    )
                total[:, span] += part
            # Before the next heads are projected, or two sets would be in memory.
            del results
        assert total is not None
        return total.to(part.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        plan, norm, (x, output, *parameters) = ctx.plan, ctx.norm, saved
        whole, trained = parameters[: ctx.count], parameters[ctx.count :]
        d_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        d_output, *d_parameters = (
            torch.zeros_like(parameter) for parameter in (output, *parameters)
        )
        # Autocast's cache would keep half-precision copies of weights alive after their use.
        with torch.autocast(**ctx.autocast, cache_enabled=False):
            for heads, rows in plan.spans(output):
                weights = [weight[rows] for weight in whole]
                # Cut off from the graph: backward goes from the results to here at once, and from
                # here to the input span by span.
                leaves = tuple(map(_leaf, _projected(plan, norm, x, weights)))
                with torch.enable_grad():
                    results = plan.attend(leaves, heads)
                d_results = torch.empty_like(results)
                for span in _spans(x):
                    joined, weight = (
                        _leaf(_joined(results.detach()[:, :, span])),
                        _leaf(output[:, rows]),
                    )
                    with torch.enable_grad():
                        part = F.linear(joined, weight)
                    d_joined, d_weight = torch.autograd.grad(
                        part, (joined, weight), upstream[:, span]
                    )
                    d_results[:, :, span] = d_joined.unflatten(
                        -1, (results.shape[1], -1)
                    ).transpose(1, 2)
                    d_output[:, rows] += d_weight
                d_leaves = torch.autograd.grad(results, leaves, d_results)
                del results, d_results, leaves, part, d_joined
                for span, wide, inner in _spans_after(x, plan.before):
                    sources = tuple(map(_leaf, (_normalised(norm, x[:, wide]), *weights)))
                    with torch.enable_grad():
                        parts = [
                            part[:, :, inner]
                            for part in plan.project(sources[0], sources[1:], wide)
                        ]
                    d_input, *of_weights = torch.autograd.grad(
                        parts, sources, [d[:, :, span] for d in d_leaves]
                    )
                    d_x[:, wide] += d_input
                    for total, d in zip(d_parameters, of_weights, strict=False):
                        total[rows] += d
                del d_leaves
            # So far d_x is the gradient of the normalised input, summed over heads. The norm's
            # backward turns it into that of the input, in place.
            for span in _spans(x) if norm is not None else ():
                leaf = _leaf(x[:, span])
                with torch.enable_grad():
                    h = _normalised(norm, leaf)
                d_input, *of_norm = torch.autograd.grad(
                    h, (leaf, *trained), d_x[:, span].to(h.dtype)
                )
                d_x[:, span] = d_input
                for total, d in zip(d_parameters[len(whole) :], of_norm, strict=True):
                    total += d
        return None, None, None, d_x.to(x.dtype), d_output, *d_parameters


def _projected(
    plan: ByHeads, norm: nn.Module | None, x: Tensor, weights: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return queries, keys and values of some heads, for all tokens."""
    whole: list[Tensor] = []
    for span, wide, inner in _spans_after(x, plan.before):
        parts = plan.project(_normalised(norm, x[:, wide]), weights, wide)
        whole = whole or [
            part.new_empty(*part.shape[:2], x.shape[1], part.shape[-1]) for part in parts
        ]
        for to, part in zip(whole, parts, strict=True):
            to[:, :, span] = part[:, :, inner]
    return whole


def _normalised(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _spans(x: Tensor) -> Iterator[slice]:
    return (slice(first, first + SPAN) for first in range(0, x.shape[1], SPAN))


def _spans_after(x: Tensor, before: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield spans of tokens, the same with `before` tokens before them, and the slice of that which
    is the span.
    """
    for span in _spans(x):
        first = max(0, span.start - before)
        yield span, slice(first, span.stop), slice(span.start - first, None)


def _joined(results: Tensor) -> Tensor:
    """Reshape [batch, heads, tokens, head dim] to [batch, tokens, head dims]."""
    return results.transpose(1, 2).flatten(2)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
