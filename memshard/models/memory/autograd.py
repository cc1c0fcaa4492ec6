"""Reads of a table as autograd functions, which keep what the row gradients need.

Gradients to weights and inputs are exact and returned as usual. WeightedSum and Dot read the local
part of a table. FetchedSum and FetchedDot read rows that are elsewhere (on other ranks, in host
memory): each distinct row is fetched once, and its summed gradient is returned to it. All take the
table's anchor, so that backward reaches them even if nothing else needs a gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memshard.models import compat
from memshard.models.kernels import plain_rows
from memshard.models.kernels.backend import RowBackend
from memshard.models.kernels.plain_rows import bag_of_each_read
from memshard.models.memory.hidden import HideableTable
from memshard.models.memory.host import to_device
from memshard.models.memory.row_gradient import Read, row_gradients
from memshard.models.once import Saved, differentiable_once

_BLOCK_ROWS = 4096


class WeightedSum(torch.autograd.Function):
    """apply(weights, anchor, table, rows, offsets): weighted sums of a hidden table's rows.

    weights, rows: [reads]; offsets: [bags]; returns [bags, columns].
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        anchor: Tensor,
        table: HideableTable,
        rows: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        ctx.table, ctx.device = table, weights.device
        rows, weights, offsets = table.to_table_device(rows, weights, offsets)
        ctx.in_bf16 = (
            table.weight.is_cuda
            and table.backend is not plain_rows
            and torch.is_autocast_enabled("cuda")
            and torch.get_autocast_dtype("cuda") == torch.bfloat16
        )
        # The values are saved for autograd's check that nobody has changed them in between.
        ctx.save_for_backward(table.weight, rows, weights, offsets)
        sums = table.backend.gather_sum(table.weight, rows, weights, offsets)
        return to_device(sums, ctx.device)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (values, rows, weights, offsets), table = saved, ctx.table
        # Contiguous: a sum's gradient may be one number expanded to all rows,
        # and kernels read rows.
        (upstream,) = table.to_table_device(upstream.contiguous())
        if ctx.in_bf16:
            # As autocast does for a matrix product. Rows' gradients gather it for each read: 8 GB
            # in fp32 of 16k tokens, 128 reads and 1,024 values, from 67 MB that no cache holds.
            upstream = upstream.to(torch.bfloat16)
        if _table_learns(ctx, table):
            table.collect(Read(rows, weights, offsets, upstream))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        scores = table.backend.score_gradients(values, rows, offsets, upstream)
        return to_device(scores, ctx.device), None, None, None, None


class Dot(torch.autograd.Function):
    """apply(x, anchor or weight, table, rows, offsets): products of rows with their bag's x.

    x: [bags, columns]; rows: [reads]; offsets: [bags]; returns [reads]. The gradient to a row is a
    weighted sum of x, so a hidden table collects it as it does those of `WeightedSum`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor_or_weight: Tensor,
        table: HideableTable,
        rows: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        ctx.table, ctx.device = table, x.device
        rows, x, offsets = table.to_table_device(rows, x, offsets)
        ctx.save_for_backward(table.weight, rows, x, offsets)
        products = table.backend.score_gradients(table.weight, rows, offsets, x)
        return to_device(products, ctx.device)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (values, rows, x, offsets), table = saved, ctx.table
        (upstream,) = table.to_table_device(upstream.contiguous())
        read = Read(rows, upstream, offsets, x.contiguous())
        to_weight = None
        if _table_learns(ctx, table):
            table.collect(read)
        elif ctx.needs_input_grad[1] and not table.hidden:
            to_weight = torch.zeros_like(values)
            # A visible table gets the dense gradient that autograd expects, 4,096 rows at a time:
            # 16 MB of 1,024 values on top of it.
            for distinct, gradients in row_gradients([read], _BLOCK_ROWS, table.backend):
                # Added, since the last row may come again with zeros.
                to_weight.index_add_(0, distinct, gradients.to(values.dtype))
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None, None, None
        to_x = table.backend.gather_sum(values, rows, upstream, offsets)
        return to_device(to_x, ctx.device), to_weight, None, None, None


@dataclass(frozen=True)
class Fetch:
    """Rows to fetch from a table, and the reads of them.

    wanted: the rows of the local part that are asked for; inverse: [reads] int32, which of the
    fetched rows each read is, all of which are read; order: [reads], the reads by row, stably;
    starts: [distinct + 1] int64, where each row's begin in it; offsets: [bags] int64, where each
    bag's reads start; backend: sums the fetched rows where the reads are, which need not be where
    the table is.
    """

    table: HideableTable
    wanted: Tensor
    inverse: Tensor
    order: Tensor
    starts: Tensor
    offsets: Tensor
    backend: RowBackend

    def fetch_rows(self) -> Tensor:
        """Return the fetched rows, [distinct, dim]."""
        return self.table.rows_at(self.wanted)

    def return_gradients(self, gradients: Tensor, learns: bool) -> None:
        """Send the row gradients [distinct, dim], in the weights' dtype, to the rows' owner.

        learns: whether the backward pass was asked for the table's gradient.
        """
        if learns:
            self.table.collect_row_gradients(self.wanted, gradients)


class FetchedSum(torch.autograd.Function):
    """apply(weights, anchor, fetch): weighted sums of fetched rows. weights: [reads]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, anchor: Tensor, fetch: Fetch) -> Tensor:
        fetched = fetch.fetch_rows()
        ctx.fetch = fetch
        # Rows that are taken as they are have no weights to learn, for which alone they are kept.
        ctx.save_for_backward(fetched if ctx.needs_input_grad[0] else None, weights)
        return fetch.backend.gather_sum(fetched, fetch.inverse, weights, fetch.offsets)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (fetched, weights), fetch = saved, ctx.fetch
        upstream = upstream.contiguous()
        # Before the early return: in a split table the other ranks wait in this exchange.
        gradients = _row_gradients(fetch, weights, upstream)
        fetch.return_gradients(gradients, _table_learns(ctx, fetch.table))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        scores = fetch.backend.score_gradients(fetched, fetch.inverse, fetch.offsets, upstream)
        return scores, None, None


class FetchedDot(torch.autograd.Function):
    """apply(x, anchor, fetch): products of fetched rows with their bag's x. x: [bags, dim]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, fetch: Fetch) -> Tensor:
        fetched = fetch.fetch_rows()
        ctx.fetch = fetch
        ctx.save_for_backward(fetched, x)
        return fetch.backend.score_gradients(fetched, fetch.inverse, fetch.offsets, x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (fetched, x), fetch = saved, ctx.fetch
        upstream = upstream.contiguous()
        gradients = _row_gradients(fetch, upstream, x.contiguous())
        fetch.return_gradients(gradients, _table_learns(ctx, fetch.table))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        to_x = fetch.backend.gather_sum(fetched, fetch.inverse, upstream, fetch.offsets)
        return to_x, None, None


def _row_gradients(fetch: Fetch, weights: Tensor, upstream: Tensor) -> Tensor:
    """Return the gradients of the fetched rows, [distinct, dim], in the weights' dtype."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    bags = bag_of_each_read(fetch.offsets, len(weights)).to(torch.int32)
    sums = fetch.backend.segment_sums(
        upstream.to(dtype), bags[fetch.order], weights[fetch.order].to(dtype), fetch.starts
    )
    return sums.to(weights.dtype)


def _table_learns(ctx: Any, table: HideableTable) -> bool:
    """Return whether this backward pass adds to the gradient of a hidden table, as it would to that
    of a parameter: not if the table is frozen, nor if the pass was asked for other gradients only.
    """
    learns = ctx.needs_input_grad[1] and table.hidden and compat.backward_wants(table.anchor)
    if learns and compat.in_compiled_backward():
        # It gives the anchor no gradient, and without one a step drops the reads.
        raise NotImplementedError(
            "a hidden table learns nothing under compiled autograd: turn that off, or keep the "
            "table visible (no externalize_tables)"
        )
    return learns
