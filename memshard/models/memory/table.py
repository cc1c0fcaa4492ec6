"""The value table: interface, local form, and how it is hidden from dense optimizers and
wrappers.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.memory.bags import gather_sum, score_gradients
from memshard.models.memory.fetched import Fetch, FetchedDot, FetchedSum
from memshard.models.memory.host import to_device, to_host
from memshard.models.memory.huge_pages import prefer_huge_pages
from memshard.models.memory.row_gradient import Read, SortedReads, row_gradients, sort_reads
from memshard.models.random import normal_rows

_INIT_ROWS = 4096

ANCHOR_UNIT = 2.0**-40
"""What one read adds to the anchor's gradient: nothing beside the gradients that share a norm with
it, exact when scaled.
"""


class ReadObserver(Protocol):
    """Whoever wants to see which rows are read, and how strongly."""

    def on_read(self, rows: Tensor, weights: Tensor, counts: Tensor | None = None) -> None:
        """rows: [reads] integers, of this rank's part of the table; weights: [reads], each the sum
        of `counts` reads (1 if left out).
        """


class ValueTable(nn.Module):
    """slots x dim values, read as weighted sums of rows. local_rows, local_columns: the part
    stored on this rank; default: the whole table.

    `weight` [rows, columns] is an ordinary parameter until `hide`: then it is a plain tensor that
    `parameters()` does not show, that `state_dict()`, `.to()` and `deepcopy` still carry, and whose
    gradient is collected as `reads` for a row-sparse optimizer. `anchor` stands for the table in
    that optimizer: its gradient [2] counts the reads in ANCHOR_UNITs (a loss scaler then divides it
    as it does all gradients), and its second number is NaN if one of them was not finite. Reads
    whose count was scaled or cleared, and that no step followed before the next backward, belong to
    a skipped step and are dropped.
    """

    weight: Tensor

    def __init__(
        self,
        slots: int,
        dim: int,
        local_rows: range | None = None,
        local_columns: range | None = None,
    ) -> None:
        super().__init__()
        local_rows = range(slots) if local_rows is None else local_rows
        self.slots = slots
        self.dim = dim
        self.first_row = local_rows.start
        self.local_columns = range(dim) if local_columns is None else local_columns
        self.observer: ReadObserver | None = None
        self.gradient_scale = 1.0
        """Factor of collected gradients: 1 / ranks where each rank's loss is a mean over its own
        tokens, as under DDP.
        """
        self.replica_count = 1
        """Number of ranks that store the same part."""
        self.ranks_seeing_each_read = 1
        """Number of ranks in the sharding group that see the same read."""
        self.host = False
        """Whether the table, once hidden, stays in host memory wherever the model goes; set before
        the model moves. What an optimizer keeps for it is there, too, and updates it there; what
        is read and its gradients travel.
        """
        self.reads_asked = 0
        """Reads that this rank's own tokens have asked for, gradients wanted, since the collected
        gradient was last dropped.
        """
        self.weight = nn.Parameter(
            prefer_huge_pages(torch.empty(len(local_rows), len(self.local_columns)))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw rows from N(0, 1/dim) (Lample et al. 2019), each from its number and one draw of
        torch's generator.
        """
        seed = int(torch.randint(1 << 62, (), device="cpu"))
        if self.weight.is_meta:
            return
        columns = slice(self.local_columns.start, self.local_columns.stop)
        with torch.no_grad():
            for start in range(0, len(self.weight), _INIT_ROWS):
                block = self.weight[start : start + _INIT_ROWS]
                rows = normal_rows(
                    seed, self.first_row + start, len(block), self.dim, self.weight.device
                )
                block.copy_(rows[:, columns] * self.dim**-0.5)

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """sum_j weights[t, j] * weight[rows[t, j]].

        rows: [tokens, reads] integers; weights: the same shape. Returns [tokens, dim], in the wider
        of the two dtypes once the table is hidden and in the table's before. Gradients to weights
        are exact; those to the table are dense, or collected once it is hidden.
        """
        self._count(rows)
        return self._local_sum(rows.flatten(), weights.flatten(), bag_offsets(rows))

    def dot(self, rows: Tensor, x: Tensor) -> Tensor:
        """x[t] . weight[rows[t, j]].

        rows: [tokens, reads] integers; x: [tokens, dim]. Returns [tokens, reads], in the wider of
        the two dtypes. Gradients to x are exact; those to the table as in `weighted_sum`.
        """
        self._count(rows)
        return self._local_dot(rows.flatten(), x, bag_offsets(rows)).view(rows.shape)

    def _count(self, rows: Tensor) -> None:
        if self.hidden and torch.is_grad_enabled():
            self.reads_asked += rows.numel()

    def _local_sum(self, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """Weighted sums of the part that is here, one a bag. rows, weights: [reads]; offsets:
        [bags].
        """
        if self.observer is not None:
            self.observer.on_read(rows, weights.detach())
        if not self.hidden:
            return F.embedding_bag(
                rows,
                self.weight,
                offsets,
                mode="sum",
                per_sample_weights=weights.to(self.weight.dtype),
            )
        weights = weights.to(torch.promote_types(weights.dtype, self.weight.dtype))
        # Half the memory of what is kept until the update.
        rows = rows.to(torch.int32) if self.slots < 2**31 else rows
        fetch = self._worth_fetching(rows, offsets)
        if fetch is not None:
            return FetchedSum.apply(weights, self.anchor, fetch)
        return _WeightedSum.apply(weights, self.anchor, self, rows, offsets)

    def _local_dot(self, rows: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        """Products of the part that is here with its bag's x. rows: [reads]; x: [bags, columns];
        offsets: [bags]; returns [reads].
        """
        if self.observer is not None:
            self.observer.on_read(rows, x.new_ones(len(rows)))
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        rows = rows.to(torch.int32) if self.slots < 2**31 else rows
        fetch = self._worth_fetching(rows, offsets)
        if fetch is not None:
            return FetchedDot.apply(x, self.anchor, fetch)
        return _Dot.apply(x, self.autograd_handle, self, rows, offsets)

    def _worth_fetching(self, rows: Tensor, offsets: Tensor) -> Fetch | None:
        """Of a table in host memory: the distinct rows, if less travels when they do than when
        rows, weights and each bag's sum do.
        """
        if not (self.host and self.hidden):
            return None
        distinct, inverse = torch.unique(rows, return_inverse=True)
        dim = self.weight.shape[1]
        fetched = len(distinct) * (dim * (self.weight.itemsize + 4) + rows.itemsize)
        pooled = len(offsets) * dim * 8 + len(rows) * (rows.itemsize + 8)
        return Fetch(self, distinct, inverse.to(torch.int32), offsets) if fetched < pooled else None

    def to_table_device(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors where the values lie."""
        return to_host(*tensors) if self.host and self.hidden else list(tensors)

    def rows_at(self, rows: Tensor) -> Tensor:
        """weight[rows], where `rows` [n] lies."""
        (local,) = self.to_table_device(rows)
        out = self.weight.new_empty(
            len(local), self.weight.shape[1], pin_memory=rows.is_cuda and not local.is_cuda
        )
        return to_device(torch.index_select(self.weight, 0, local, out=out), rows.device)

    def collect_row_gradients(self, rows: Tensor, gradients: Tensor) -> None:
        """Collect the gradients [n, columns] of some rows [n]."""
        rows, gradients = self.to_table_device(rows, gradients)
        numbers = torch.arange(len(rows), device=rows.device)
        self.collect(Read(rows, gradients.new_ones(len(rows)), numbers, gradients))

    def collect(self, read: Read) -> None:
        """Keep a read's gradient for the optimizer, and count it in the anchor's."""
        if self.reads and (
            self.anchor.grad is None or float(self.anchor.grad[0]) != len(self.reads) * ANCHOR_UNIT
        ):
            # A loss scaler has unscaled these and skipped the step, and model.zero_grad() does not
            # see hidden tables.
            self.reads.clear()
            self.anchor.grad = None
        self.reads.append(read)
        # One pass without temporaries; NaN goes through a maximum, too.
        largest = [
            torch.linalg.vector_norm(x, torch.inf)
            for x in (read.upstream, read.weights)
            if x.numel()
        ]
        finite = (
            torch.isfinite(torch.stack(largest)).all()
            if largest
            else torch.tensor(True, device=self.anchor.device)
        )
        count = torch.stack(
            (
                torch.full_like(self.anchor[0], ANCHOR_UNIT),
                torch.where(finite, 0.0, torch.nan).to(self.anchor.dtype),
            )
        )
        self.anchor.grad = count if self.anchor.grad is None else self.anchor.grad.add_(count)

    def gradients(self, scale: float) -> Iterator[SortedReads]:
        """The collected gradient times `scale`: ascending parts without common rows, summed over
        all that hold the same rows.
        """
        merged = sort_reads(self.reads)
        if merged is not None:
            yield merged.scaled(scale)

    def gather_rows(self, x: Tensor, rows: Tensor, slots: int | None = None) -> Tensor:
        """x[rows] of what is split as the rows of a table of `slots` (by default: as this one's).
        rows: [n] int64, of the whole table.
        """
        return x[rows]

    @property
    def max_local_rows(self) -> int:
        """Rows of the part that has most."""
        return len(self.weight)

    def sum_over_shards(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the parts of the table."""
        return x

    @property
    def local_row_count(self) -> int:
        """Rows of the part that is here."""
        return len(self.weight)

    @property
    def hidden(self) -> bool:
        """Whether the table is out of `parameters()`."""
        return "weight" not in self._parameters

    @property
    def autograd_handle(self) -> Tensor:
        """What has the table's gradient: the weight, or the anchor of a hidden table."""
        return self.anchor if self.hidden else self.weight

    def hide(self) -> None:
        """Take the table out of `parameters()`."""
        if not self.hidden:
            values = self.weight.data
            del self.weight
            self.set_values(values)

    def set_values(self, values: Tensor) -> None:
        """Make `values` [rows, dim] the hidden table's content."""
        self.weight = values
        self.reads: list[Read] = []
        self.anchor = self._new_anchor().requires_grad_()

    def drop_reads(self) -> None:
        """Forget the collected gradient."""
        self.reads.clear()
        self.reads_asked = 0
        self.anchor.grad = None

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        if self.hidden:
            self.weight = prefer_huge_pages(self._to_host(fn) if self.host else fn(self.weight))
            self._place_anchor()
        return self

    def _to_host(self, fn):  # type: ignore[no-untyped-def]
        like = fn(self.weight[:0])  # follows the dtype, not the device
        if self.weight.is_meta:
            return torch.empty(
                self.weight.shape, dtype=like.dtype, device="meta" if like.is_meta else "cpu"
            )
        return self.weight.to("cpu", like.dtype)

    def _new_anchor(self) -> Tensor:
        # Optimizers cast their state to this dtype when they load it.
        return torch.zeros(
            2,
            dtype=torch.promote_types(self.weight.dtype, torch.float32),
            device=self.weight.device,
        )

    def _place_anchor(self) -> None:
        if self.anchor.is_meta:
            self.anchor = self._new_anchor().requires_grad_()
        else:
            # An optimizer may know the table by its anchor, so that stays the same object.
            self.anchor.data = self._new_anchor()

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.hidden:
            destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        hidden = self.hidden
        if hidden:
            # A parameter while it loads: torch's own checks then serve hidden tables too.
            values = self.weight
            del self.weight
            self.weight = nn.Parameter(values, requires_grad=False)
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        if hidden:
            values = self.weight.data
            del self.weight
            self.weight = values
            self._place_anchor()


class _WeightedSum(torch.autograd.Function):
    """Sums of a hidden table's rows; backward gives exact gradients to the weights and keeps what
    the row gradients need.
    """

    @staticmethod
    def forward(ctx, weights, anchor, table, rows, offsets):  # type: ignore[no-untyped-def]
        ctx.table, ctx.device = table, weights.device
        rows, weights, offsets = table.to_table_device(rows, weights, offsets)
        # The values are saved for autograd's check that nobody has changed them in between.
        ctx.save_for_backward(table.weight, rows, weights, offsets)
        return to_device(gather_sum(table.weight, rows, weights, offsets), ctx.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        values, rows, weights, offsets = ctx.saved_tensors
        (upstream,) = ctx.table.to_table_device(upstream.contiguous())
        ctx.table.collect(Read(rows, weights, offsets, upstream))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return (
            to_device(score_gradients(values, rows, offsets, upstream), ctx.device),
            None,
            None,
            None,
            None,
        )


class _Dot(torch.autograd.Function):
    """Products of rows and tokens. Their gradient to a row is a weighted sum of tokens, so it is
    collected as that of a read.
    """

    @staticmethod
    def forward(ctx, x, anchor_or_values, table, rows, offsets):  # type: ignore[no-untyped-def]
        ctx.table, ctx.device = table, x.device
        rows, x, offsets = table.to_table_device(rows, x, offsets)
        ctx.save_for_backward(table.weight, rows, x, offsets)
        return to_device(score_gradients(table.weight, rows, offsets, x), ctx.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        values, rows, x, offsets = ctx.saved_tensors
        (upstream,) = ctx.table.to_table_device(upstream.contiguous())
        read = Read(rows, upstream, offsets, x.contiguous())
        to_table = None
        if ctx.table.hidden:
            ctx.table.collect(read)
        else:
            to_table = torch.zeros_like(values)
            for found, gradient in row_gradients([read], _INIT_ROWS):
                to_table[found] = gradient.to(values.dtype)
        to_x = (
            to_device(gather_sum(values, rows, upstream, offsets), ctx.device)
            if ctx.needs_input_grad[0]
            else None
        )
        return to_x, to_table, None, None, None


def bag_offsets(rows: Tensor) -> Tensor:
    """Where each token's reads start in rows.flatten(). rows: [tokens, reads]; returns [tokens]
    int64.
    """
    return torch.arange(len(rows), device=rows.device) * rows.shape[1]


def find_tables(model: nn.Module) -> Iterator[tuple[str, ValueTable]]:
    """(name, table) of every table in the model; one shared by several layers comes once, under its
    first name.
    """
    for name, module in model.named_modules():
        if isinstance(module, ValueTable):
            yield name, module


def externalize_tables(model: nn.Module) -> list[ValueTable]:
    """Hide all value tables of the model from `parameters()` and return them, for `RowAdam`.

    Call it before any wrapping: DDP and DeepSpeed broadcast, cast and all-reduce whatever
    `parameters()` shows.
    """
    tables = [table for _, table in find_tables(model)]
    for table in tables:
        table.hide()
    return tables
