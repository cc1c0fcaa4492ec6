"""A value table whose columns are split within a group of ranks that all read the same rows."""

import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.memory.table import bag_offsets
from memshard.parallel.collectives import all_sum
from memshard.parallel.tables.columns import ColumnShardedTable
from memshard.parallel.tables.layouts import LAYOUTS


class TensorColumnTable(ColumnShardedTable):
    """Columns split as in `ColumnShardedTable`, over ranks that pass the same rows, weights and x,
    as under tensor parallelism, and get the same gradient of the result.

    Only slices of sums and the gradients of weights are sent: (P - 1) / P * b (d + 2 reads) bytes a
    token (d values of b = 4 bytes, P ranks).
    """

    layout = LAYOUTS["tensor-columns"]

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Do what `ValueTable.weighted_sum` does; all ranks of the group pass the same tokens."""
        self._count_once(rows)
        weights = _SummedGradient.apply(weights, self)
        slices = self._local_sum(rows.flatten(), weights.flatten(), bag_offsets(rows))
        return _AllColumns.apply(slices, self)

    def dot(self, rows: Tensor, x: Tensor) -> Tensor:
        """Do what `ValueTable.dot` does; all ranks of the group pass the same tokens."""
        self._count_once(rows)
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        slices = _SummedGradient.apply(x, self)[
            :, self.local_columns.start : self.local_columns.stop
        ]
        products = self._local_dot(rows.flatten(), slices, bag_offsets(rows))
        return _SummedProducts.apply(products, self).view(rows.shape)

    def _count_once(self, rows: Tensor) -> None:
        # Metrics sum the counts over ranks, and these ranks read the same.
        if dist.get_rank(self.group) == 0:
            self._count(rows)
        else:
            self.check_optimizer()


class _SummedGradient(torch.autograd.Function):
    """The identity on inputs that all ranks share. Each rank knows the part of their gradient that
    comes from its columns; backward sums the parts.
    """

    @staticmethod
    def forward(ctx, weights, table):  # type: ignore[no-untyped-def]
        ctx.table = table
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        table = ctx.table
        table.traffic.reads += (
            2 * (table.ranks - 1) * gradient.numel() * gradient.element_size() // table.ranks
        )
        return all_sum(gradient, table.group), None


class _AllColumns(torch.autograd.Function):
    """All ranks' slices of the same tokens. The gradient is the same on all ranks, so each takes
    its own columns of it.
    """

    @staticmethod
    def forward(ctx, slices, table):  # type: ignore[no-untyped-def]
        ctx.columns = slice(table.local_columns.start, table.local_columns.stop)
        tokens = len(slices)
        # Every rank wants this rank's columns of all tokens, which are the same for all ranks.
        return table.join(slices.repeat(table.ranks, 1), [tokens] * table.ranks, tokens)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient[:, ctx.columns], None


class _SummedProducts(torch.autograd.Function):
    """The sum over ranks of their columns' products; its gradient is the same on all ranks."""

    @staticmethod
    def forward(ctx, products, table):  # type: ignore[no-untyped-def]
        table.traffic.reads += (
            2 * (table.ranks - 1) * products.numel() * products.element_size() // table.ranks
        )
        return all_sum(products, table.group)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        # The sum passes the gradient on to each addend; it is already the same on all ranks.
        return gradient, None
