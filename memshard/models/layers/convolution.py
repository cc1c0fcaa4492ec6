"""Causal depthwise convolutions along a text (Primer, So et al. 2021, "multi-DConv-head
attention"), and their state in decoding.

One kernel for each channel of each head, applied after the projections of queries, keys and values.
B batch, T length, C channels, K width, dilation the distance of the tokens that a kernel sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.context import Context
from memshard.models.fast_weights.segments import Neighbours
from memshard.models.once import Saved, differentiable_once

# Numbers processed at a time: small enough that all passes over them but the first hit the cache.
_BLOCK = 1 << 17
# Tokens that a state can roll back, for speculative decoding.
_TAKEN_BACK = 16


class CausalConvolution(nn.Module):
    """The kernels of C channels.

    width: number of tokens that a token sees, itself included; dilation: their distance. zero:
    whether kernels begin at 0. weight: [C K], the lags of a channel together, starting with lag 0.
    Flat, because optimizers apply weight decay to matrices only.
    """

    def __init__(
        self, channels: int, width: int = 3, dilation: int = 1, zero: bool = False
    ) -> None:
        super().__init__()
        self.width, self.dilation, self.zero = width, dilation, zero
        self.weight = nn.Parameter(torch.empty(channels * width))
        self.reset_parameters()

    @property
    def kernel(self) -> Tensor:
        """[C, K], a view of the weight."""
        return self.weight.view(-1, self.width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set 1 / 2 for the current token and 1 / (2 K) for each earlier one, as published, or
        zeros.
        """
        if self.zero:
            self.kernel.zero_()
        else:
            self.kernel.fill_(0.5 / self.width)
            self.kernel[:, 0] = 0.5


@dataclass(frozen=True)
class RecentRows:
    """The state of convolutions: their newest inputs, concatenated.

    rows: [B, kept, channels of all], 0 where there was no token; documents: [B, kept] int64. The
    next token needs the newest `needed`; the earlier ones are there for `rollback`.
    """

    rows: Tensor
    documents: Tensor
    needed: int

    def reorder(self, rows: Tensor) -> "RecentRows":
        """Return the state whose row i is row rows[i] of this one."""
        return RecentRows(self.rows[rows], self.documents[rows], self.needed)

    def rollback(self, tokens: int) -> "RecentRows":
        """Return the state before the last `tokens` tokens. ValueError beyond 16 of them."""
        kept = self.rows.shape[1] - tokens
        if kept < self.needed:
            raise ValueError(
                f"convolutions take back at most {self.rows.shape[1] - self.needed} tokens here, "
                f"not {tokens}; keep the earlier state"
            )
        return RecentRows(self.rows[:, :kept], self.documents[:, :kept], self.needed)

    def reset(self, rows: Tensor) -> "RecentRows":
        """Forget everything in the given rows. rows: [B] bool."""
        return RecentRows(self.rows * ~rows[:, None, None], self.documents, self.needed)

    def followed_by(self, rows: Tensor, documents: Tensor) -> "RecentRows":
        """Return the state after newer inputs, [B, T, channels of all]."""
        kept = self.needed + _TAKEN_BACK
        joined = (
            torch.cat((self.rows, rows.to(self.rows.dtype)), 1),
            torch.cat((self.documents, documents), 1),
        )
        return RecentRows(joined[0][:, -kept:], joined[1][:, -kept:], self.needed)


class Convolutions(nn.ModuleDict):
    """The convolutions after several projections, by the projections' names. width 0: none.

    channels: of each projection. dilation: distance of the tokens that are seen. zero: whether
    kernels begin at 0.
    """

    def __init__(
        self, channels: dict[str, int], width: int, dilation: int = 1, zero: bool = False
    ) -> None:
        super().__init__(
            {
                name: CausalConvolution(count, width, dilation, zero)
                for name, count in channels.items()
                if width
            }
        )
        self.dilation, self.needed = dilation, max(0, width - 1) * dilation
        self.neighbours: Neighbours | None = None
        """Set by a mixer's `share_sequence`, where ranks share the tokens of a sequence."""

    def forward(
        self,
        inputs: Sequence[Tensor],
        ctx: Context,
        recent: RecentRows | None = None,
        kernels: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], RecentRows | None]:
        """Return each input after its convolution, and the advanced state if `recent` is given.

        inputs: the projections' outputs, [B, T, C] each (any C). Padding counts as zeros; other
        documents are not seen. Without documents in `ctx`, tokens continue the document of the last
        one in `recent`. kernels: those of the inputs' channels, if these are only some of them.
        """
        if not self:
            return list(inputs), recent
        kernels = self.kernels() if kernels is None else kernels
        if ctx.padding is not None:
            inputs = [x.masked_fill(~ctx.padding[..., None], 0) for x in inputs]
        if self.neighbours is not None:
            return self._convolve(
                kernels,
                inputs,
                ctx,
                self._before(self.neighbours, inputs, ctx, self.needed),
            )[0], None
        if recent is None:
            return [
                causal_convolution(x, kernel, ctx.documents, self.dilation)
                for x, kernel in zip(inputs, kernels, strict=True)
            ], None
        return self._convolve(kernels, inputs, ctx, recent)

    def _convolve(
        self, kernels: Sequence[Tensor], inputs: Sequence[Tensor], ctx: Context, recent: RecentRows
    ) -> tuple[list[Tensor], RecentRows]:
        needed = slice(recent.rows.shape[1] - recent.needed, None)
        before = recent.rows[:, needed].split([x.shape[-1] for x in inputs], -1)
        documents = (
            recent.documents[:, -1:].expand(inputs[0].shape[:2])
            if ctx.documents is None
            else ctx.documents
        )
        known = torch.cat((recent.documents[:, needed], documents), 1)
        outputs = [
            causal_convolution(torch.cat((old.to(x.dtype), x), 1), kernel, known, self.dilation)[
                :, recent.needed :
            ]
            for old, x, kernel in zip(before, inputs, kernels, strict=True)
        ]
        return outputs, recent.followed_by(torch.cat(list(inputs), -1), documents)

    @staticmethod
    def _before(
        neighbours: Neighbours, inputs: Sequence[Tensor], ctx: Context, needed: int
    ) -> RecentRows:
        """Return the state before this rank's segment of a text."""
        # One message for all projections.
        rows = neighbours.rows_before(torch.cat([x[:, -needed:] for x in inputs], -1), needed)
        if ctx.documents is None:
            return RecentRows(
                rows, torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device), needed
            )
        return RecentRows(rows, neighbours.rows_before(ctx.documents[:, -needed:], needed), needed)

    def nothing_recent(self, batch: int) -> RecentRows | None:
        """Return the state before a text begins; None if there are no convolutions."""
        kernels = self.kernels()
        if not kernels:
            return None
        channels = sum(len(kernel) for kernel in kernels)
        return nothing_recent(kernels[0], batch, channels, self.needed)

    def kernels(self) -> list[Tensor]:
        """Return each projection's kernels, [C, K]."""
        return [layer.kernel for layer in self.values() if isinstance(layer, CausalConvolution)]


def nothing_recent(like: Tensor, batch: int, channels: int, needed: int) -> RecentRows:
    """Return the state before a text begins. like: a tensor of the rows' dtype and device; needed:
    rows that the next token needs.
    """
    rows = like.new_zeros(batch, needed + _TAKEN_BACK, channels)
    documents = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
    return RecentRows(rows, documents, needed)


def causal_convolution(
    x: Tensor, kernel: Tensor, documents: Tensor | None = None, dilation: int = 1
) -> Tensor:
    """Return y[t] = sum of kernel[:, j] x[t - j dilation] over the j < K that stay in the document.

    x: [B, T, C]; kernel: [C, K]; documents: [B, T] int64, None for one. Returns [B, T, C] in x's
    dtype; sums are fp32 at least. Backward keeps only x.
    """
    lags = range(dilation, kernel.shape[1] * dilation, dilation)
    same = [] if documents is None else [documents[:, n:] == documents[:, :-n] for n in lags]
    # torch.compile would break the graph at the function's slices and in-place sums.
    if torch.compiler.is_compiling():
        return plain_convolution(x, kernel, same, dilation)
    return _CausalConvolution.apply(x, kernel, dilation, *same)


def plain_convolution(
    x: Tensor, kernel: Tensor, same: Sequence[Tensor], dilation: int = 1
) -> Tensor:
    """Do what `causal_convolution` does, in a form that torch.compile can fuse. same: for every
    lag, where it stays in the document, [B, T - lag] bool; empty for one document.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = wide * kernel[:, 0]
    for j in range(1, min(kernel.shape[1], -(-x.shape[1] // dilation))):
        lag = j * dilation
        total = total + F.pad(_seen(wide[:, :-lag], same, j) * kernel[:, j], (0, 0, lag, 0))
    return total.to(x.dtype)


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, dilation: int, *same: Tensor) -> Tensor:
        ctx.dilation = dilation
        ctx.save_for_backward(x, kernel, *same)
        dtype = torch.promote_types(x.dtype, torch.float32)
        lags = kernel.to(dtype).t().contiguous()
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows in _blocks(x):
            read = x[rows].to(dtype)
            # Written into the result where dtypes agree, which saves a copy of x.
            total = torch.mul(read, lags[0], out=out[rows] if x.dtype == dtype else None)
            for j in range(1, len(lags)):
                lag = j * dilation
                total[:, lag:].addcmul_(_seen(read[:, :-lag], same, j, rows), lags[j])
            if x.dtype != dtype:
                out[rows] = total
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, *same = saved
        dtype = torch.promote_types(x.dtype, torch.float32)
        lags = kernel.to(dtype).t().contiguous()
        to_x, to_lags = (
            torch.empty_like(x, memory_format=torch.contiguous_format),
            torch.zeros_like(lags),
        )
        for rows in _blocks(x):
            read, given = x[rows].to(dtype), gradient[rows].to(dtype)
            total = torch.mul(given, lags[0], out=to_x[rows] if x.dtype == dtype else None)
            # Products and sums: one einsum over batch and length takes 9 times as long (63 ms
            # against 7 for 8 x 256 x 512).
            products = given * read
            to_lags[0] += products.sum((0, 1))
            for j in range(1, len(lags)):
                lag = j * ctx.dilation
                # What y[t] = kernel[j] x[t - lag] sends back: to x the gradient
                # of `lag` tokens later.
                late = _seen(given[:, lag:], same, j, rows)
                total[:, :-lag].addcmul_(late, lags[j])
                torch.mul(late, read[:, :-lag], out=products[:, lag:])
                # Zeros, because a sum over all rows is 15 times faster than one over a slice.
                products[:, :lag] = 0
                to_lags[j] += products.sum((0, 1))
            if x.dtype != dtype:
                to_x[rows] = total
        return to_x, to_lags.t().to(kernel.dtype), None, *(None for _ in same)


def _blocks(x: Tensor) -> list[slice]:
    """Return slices of x's rows that fit a CPU's cache; on other devices one slice of all."""
    if x.device.type != "cpu":
        return [slice(None)]
    step = max(1, _BLOCK // max(1, x[0].numel())) if len(x) else 1
    return [slice(first, first + step) for first in range(0, len(x), step)]


def _seen(x: Tensor, same: Sequence[Tensor], j: int, rows: slice = slice(None)) -> Tensor:
    """Return x, with 0 where the j-th lag leads to another document."""
    return x * same[j - 1][rows, :, None] if same else x
