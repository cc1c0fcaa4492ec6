"""Attention of each token to the tokens just before it in its group, over one or several groupings.

Once tokens are sorted by group, all keys that a token sees are in its own chunk or the one before.
Attention is then a batch of products of [C, d] by [2C, d] tiles, in time and memory proportional to
the length (Kitaev et al. 2020, section 2).

N rows (batch x heads), L length, d head dim, R rounds (groupings), T chunks in all rows,
C places a chunk.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from memshard.models.compat import is_traced
from memshard.models.kernels import cpu_banded
from memshard.models.lsh.bucket_order import Order, order_tokens
from memshard.models.lsh.tiles import outside_window, tiles_of
from memshard.models.once import Saved, differentiable_once

# Scores are in powers of 2, and those that must not be seen are far below the others instead of
# -inf: on CPU exp takes 12 to 65 times as long where its result is 0.
_LOG2_E = 1 / math.log(2)
_UNSEEN, _LOWEST = 1e38, -1e37


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: Tensor, window: int, chunk: int, itself: bool = False
) -> Tensor:
    """Return softmax(q . k) v, [N, L, m] in v's dtype, over the tokens that each token sees: in
    each round its `window` predecessors in its group.

    q, k: [N, L, d]; v: [N, L, m]; groups: [N, R, L] int64. window: at most `chunk`. itself: a token
    also sees itself (as one of the `window`); otherwise a token that sees no other gets its own v.
    A pair that meets in several rounds counts once. Softmax statistics are fp32. Strictly causal: a
    token's output depends only on the tokens before it and their groups, with the compiled kernel
    to the last bit. In plain torch (GPUs, fp64) later tokens may change how a sum is rounded.
    """
    if not 1 <= window <= chunk:
        raise ValueError(
            f"a window of {window} tokens over chunks of {chunk}: the window must be between 1 "
            "and the chunk"
        )
    # Autocast would also sum weights in half precision.
    with torch.autocast(v.device.type, enabled=False):
        return _Banded.apply(q, k, v, groups, window, chunk, itself)


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        groups: Tensor,
        window: int,
        chunk: int,
        itself: bool,
    ) -> Tensor:
        settings = window, chunk, itself
        outs, totals = [], []
        ctx.orders = {}
        for rows in _row_groups(q):
            orders = order_tokens(groups[rows], window, chunk)
            if q.is_cuda:
                # 24 bytes a token and round, which making them again would take 15 launches for.
                ctx.orders[rows.start] = orders
            out, total = (cpu_banded.forward if _serves(q) else _forward)(
                q[rows], k[rows], v[rows], orders, *settings
            )
            outs.append(out)
            totals.append(total)
        out, total = _joined(outs), _joined(totals)
        ctx.save_for_backward(q, k, v, groups, out, total)
        ctx.settings = settings
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, groups, out, total = saved
        window, chunk, _ = ctx.settings
        parts = []
        for rows in _row_groups(q):
            orders = ctx.orders.get(rows.start) or order_tokens(groups[rows], window, chunk)
            tensors = q[rows], k[rows], v[rows], orders, out[rows], total[rows], d_out[rows]
            parts.append(
                (cpu_banded.backward if _serves(q) else _backward)(*tensors, *ctx.settings)
            )
        return *map(_joined, zip(*parts, strict=True)), None, None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, orders: list[Order], window: int, chunk: int, itself: bool
) -> tuple[Tensor, Tensor]:
    """Return the output and the binary logarithm of each token's total weight, infinity where it
    sees no other.
    """
    rows, length, dim = v.shape
    exact = _exact(v)
    q = q * _LOG2_E
    # Online softmax: each tile updates a token's largest score, total weight and weighted sum,
    # which also joins the rounds; the first round writes them. The first largest score is above
    # unseen ones, so a tile of unseen pairs adds weights of exactly 0. One row more than there are
    # tokens: places without a token write there.
    highest, weight, total = (
        v.new_empty(rows * length + 1, width, dtype=exact) for width in (1, 1, dim)
    )
    # bf16 products on CPU add in pairs and round each time.
    summed = v.to(exact) if v.device.type == "cpu" else v
    ones = highest.new_ones(1, 2 * chunk, 1)
    outside = _outside(v, window, chunk, itself)
    for number, order in enumerate(orders):
        for tiles, unseen in tiles_of(orders, number, window, chunk, itself, outside):
            keys, values = tiles.keys(k), tiles.keys(summed)
            scores = torch.bmm(tiles.queries(q), keys.mT).to(exact).masked_fill_(unseen, -_UNSEEN)
            queries = order.places[tiles.places]
            top = scores.amax(-1, keepdim=True)
            if number:
                old_top, old_weight, old_total = (
                    x.index_select(0, queries).view(-1, chunk, x.shape[1])
                    for x in (highest, weight, total)
                )
                top = torch.maximum(top, old_top)
            else:
                top = top.clamp_(min=_LOWEST)
            new = scores.sub_(top).exp2_()
            # Later tokens of other groups move a token's keys to other places, and with them the
            # order in which a library adds; products differ by that less often than sum().
            added = torch.bmm(new, ones.expand(len(new), -1, -1))
            read = torch.bmm(new.to(values.dtype), values).to(exact)
            if number:
                keep = old_top.sub_(top).exp2_()
                added, read = (
                    old.mul_(keep).add_(x) for old, x in ((old_weight, added), (old_total, read))
                )
            for of_all, x in ((highest, top), (weight, added), (total, read)):
                of_all.index_copy_(0, queries, x.flatten(0, 1))
    weight, highest, total = weight[:-1], highest[:-1], total[:-1]
    # A token without predecessors in its groups has weight 0.
    alone = weight <= 0
    out = torch.where(alone, v.flatten(0, 1).to(exact), total.div_(weight))
    logs = (highest + weight.log2()).masked_fill_(alone, torch.inf)
    return out.to(v.dtype).view_as(v), logs.view(rows, length)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: list[Order],
    out: Tensor,
    total: Tensor,
    d_out: Tensor,
    window: int,
    chunk: int,
    itself: bool,
) -> tuple[Tensor, ...]:
    logs = total[..., None]
    exact = _exact(v)
    q = q * _LOG2_E
    # Softmax's backward: d score = weight (d weight - mean), where mean = sum of weight x d weight
    # over keys = d_out . out, as in FlashAttention (Dao et al. 2022, appendix B).
    mean = (d_out.to(exact) * out.to(exact)).sum(-1, keepdim=True)
    logs_and_means = torch.cat((logs, mean), -1)
    # Sums over rounds, with one row more for places without a token.
    widths = [x.shape[-1] for x in (q, k, v)]
    sums = v.new_zeros(logs.numel() + 1, sum(widths), dtype=exact)
    d_q, d_k, d_v = sums.split(widths, 1)
    outside = _outside(v, window, chunk, itself)
    for number, order in enumerate(orders):
        for tiles, unseen in tiles_of(orders, number, window, chunk, itself, outside):
            queries, upstream, keys, values = (
                tiles.queries(q),
                tiles.queries(d_out),
                tiles.keys(k),
                tiles.keys(v),
            )
            # From the saved logarithm of the total weight, so no second pass looks for the largest
            # score. It is infinite for tokens that saw no other: weights 0.
            log, mean = tiles.queries(logs_and_means).split(1, -1)
            weights = (
                torch.bmm(queries, keys.mT)
                .to(exact)
                .masked_fill_(unseen, -_UNSEEN)
                .sub_(log)
                .exp2_()
            )
            d_scores = torch.bmm(upstream, values.mT).to(exact).sub_(mean).mul_(weights).to(q.dtype)
            _add_rows(d_q, order.places[tiles.places], torch.bmm(d_scores, keys))
            seen = order.places[tiles.with_previous]
            of_keys = torch.bmm(d_scores.mT, queries)
            of_values = torch.bmm(weights.to(v.dtype).mT, upstream)
            if q.is_cuda:
                # Both together: five launches for fourteen. Rows are distinct but for empty places,
                # which nobody reads.
                both = torch.cat((of_keys, of_values), -1)
                for rows, x in ((seen[:-chunk], both[:, :chunk]), (seen[chunk:], both[:, chunk:])):
                    sums[:, widths[0] :].index_add_(0, rows, x.to(exact).flatten(0, 1))
            else:
                _add_rows(d_k, seen, _overlapped(of_keys))
                _add_rows(d_v, seen, _overlapped(of_values))
    d_q, d_k, d_v = (x[:-1].view(*logs.shape[:2], -1) for x in (d_q, d_k, d_v))
    d_k *= math.log(2)  # its queries were scaled
    d_v += d_out.masked_fill(logs != torch.inf, 0)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def _serves(q: Tensor) -> bool:
    """Return whether the compiled kernel is used for such tensors."""
    return (
        q.device.type == "cpu"
        and q.dtype != torch.float64
        and not is_traced(q)
        and _kernel_agrees()
    )


@cache
@torch.no_grad()
def _kernel_agrees() -> bool:
    """Return whether there is a compiled kernel and it agrees with plain torch."""
    if cpu_banded.kernel() is None:
        return False
    random = torch.Generator().manual_seed(0)
    # Odd sizes on purpose: 45 tokens leave a part of a chunk of 8, and 20 channels
    # part of a vector.
    q, k, v, d_out = torch.randn(4, 2, 45, 20, generator=random)
    orders = order_tokens(torch.randint(3, (2, 3, 45), generator=random), 5, 8)
    for itself in (False, True):
        settings = 5, 8, itself
        out, total = _forward(q, k, v, orders, *settings)
        theirs = out, total, *_backward(q, k, v, orders, out, total, d_out, *settings)
        ours = (
            *cpu_banded.forward(q, k, v, orders, *settings),
            *cpu_banded.backward(q, k, v, orders, out, total, d_out, *settings),
        )
        if not all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs, strict=True)
        ):
            return False
    return True


def _exact(x: Tensor) -> torch.dtype:
    """Return the dtype of softmax statistics: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def _outside(v: Tensor, window: int, chunk: int, itself: bool) -> Tensor:
    made = outside_window.__wrapped__ if is_traced(v) else outside_window
    return made(window, chunk, itself, v.device)


def _row_groups(q: Tensor) -> Iterator[slice]:
    """Yield slices of rows to sort together: several short ones, or one long one."""
    # Some 65,000 tokens at once keep the sort's arrays in a core's cache.
    step = max(1, (1 << 16) // max(1, q.shape[1])) if q.device.type == "cpu" else len(q)
    return (slice(first, first + step) for first in range(0, len(q), step))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _overlapped(x: Tensor) -> Tensor:
    """Sum the entries of the same place: [tiles, 2C, d] to [(tiles + 1) C, d]."""
    chunk = x.shape[1] // 2
    total = x.new_empty(len(x) + 1, chunk, x.shape[2])
    total[:-1] = x[:, :chunk]
    total[-1] = 0
    # Each chunk of keys is in two tiles: as the own chunk, and as the one before.
    total[1:] += x[:, chunk:]
    return total.flatten(0, 1)


def _add_rows(total: Tensor, rows: Tensor, x: Tensor) -> None:
    """Do total[rows] += x for distinct rows; index_add_ adds them one by one on CPU."""
    if x.is_cuda:
        total.index_add_(0, rows, x.view(len(rows), -1).to(total.dtype))
    else:
        total.index_copy_(0, rows, total.index_select(0, rows).add_(x.view(len(rows), -1)))
