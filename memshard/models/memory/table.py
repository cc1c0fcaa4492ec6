"""The value table as a layer sees it: weighted sums of rows, products with rows, on one device.

Tables that are split over ranks are in parallel/tables/; how a table is hidden from dense
optimizers, and what happens to its gradient, is in hidden.py.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memshard.models import compat
from memshard.models.kernels.backend import backend_for
from memshard.models.kernels.plain_rows import bag_of_each_read
from memshard.models.memory.autograd import Dot, Fetch, FetchedDot, FetchedSum, WeightedSum
from memshard.models.memory.check_input import check_dtype, check_reads
from memshard.models.memory.hidden import HideableTable
from memshard.models.memory.huge_pages import prefer_huge_pages
from memshard.models.memory.kinds import check_sizes
from memshard.models.memory.row_gradient import SortedReads, sort_reads
from memshard.models.random import normal_rows

_INIT_ROWS = 4096


class ReadObserver(Protocol):
    """Told which rows are read, and how strongly."""

    def on_read(self, rows: Tensor, weights: Tensor, counts: Tensor | None = None) -> None:
        """Take note of reads of this rank's part of the table.

        rows: [reads] integers; weights: [reads], each the sum of `counts` reads (1 if left out).
        """


@runtime_checkable
class TableReader(Protocol):
    """A layer with which the tables it reads are frozen."""

    @property
    def tables(self) -> "tuple[ValueTable, ...]":
        """The tables that the layer reads."""
        ...

    @property
    def learns(self) -> bool:
        """Whether the layer's own weights need gradients."""
        ...


class ValueTable(HideableTable):
    """slots x dim values, read as weighted sums of rows.

    local_rows, local_columns: the part stored on this rank; default: the whole table. `weight`
    [rows, columns] is a parameter until `hide`; then its gradient is collected for `RowAdam`.
    device, dtype: of the values, as in torch's layers.
    """

    def __init__(
        self,
        slots: int,
        dim: int,
        local_rows: range | None = None,
        local_columns: range | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(slots=slots, dim=dim)
        check_dtype(dtype)
        local_rows = range(slots) if local_rows is None else local_rows
        local_columns = range(dim) if local_columns is None else local_columns
        shape = len(local_rows), len(local_columns)
        super().__init__(prefer_huge_pages(torch.empty(shape, device=device, dtype=dtype)))
        self.slots = slots
        self.dim = dim
        self.first_row = local_rows.start
        self.local_columns = local_columns
        self.keys: int | None = None
        """Sub-keys per half of the memory that searches the table, whose rows are then slots in the
        order of `slot_rows`; None where layers know their rows.
        """
        self.observer: ReadObserver | None = None
        self.gradient_scale = 1.0
        """Factor that turns the sum of all collected row gradients into the gradient of the loss
        that the dense parameters are trained on. 1 if that loss is the sum of the losses of all
        reads, as in one process. Under DDP each rank's loss is a mean over its tokens and DDP
        averages dense gradients over the ranks; a sharded table receives reads from all of them
        and sums, so with 4 ranks the factor is 1/4 (`shard_tables`). Where ranks along the tensor
        axis all read the same, dense gradients were divided by their number on the way, and the
        factor is that number, to undo it for the table (parallel/apply.py).
        """
        self.replica_count = 1
        """Number of ranks that store the same part."""
        self.ranks_seeing_each_read = 1
        """Number of ranks in the sharding group that see the same read.

        Rows counted on every rank and summed count several times: say 8 ranks store a table twice
        (replica_count 2), each time split by columns over 4 ranks, which all see each read
        (ranks_seeing_each_read 4). If a step reads 100 rows, each of the 8 ranks updates its part
        of 100 rows, and the sum is 800 = 100 x 4 x 2. Split by rows, only a row's owner sees its
        reads: each rank updates about 25 rows, and the sum is 200 = 100 x 1 x 2. The same holds for
        dead rows, those whose `last_step` in the optimizer's state is long ago: summed over the
        shards alone, not over the replicas, they are divided by the first number only.
        """
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Return the sizes, and whether the table is hidden."""
        return f"{self.slots}, {self.dim}{', hidden' if self.hidden else ''}"

    def reset_parameters(self) -> None:
        """Draw rows from N(0, 1/dim) (Lample et al. 2019).

        Each row depends on its number and one draw of torch's generator, so parts of a table are
        drawn as in the whole.
        """
        # Also where nothing is stored, so that later draws of the generator stay the same.
        with compat.outside_modes():
            seed = int(torch.randint(1 << 62, (), device="cpu"))
        if compat.is_fake(self.weight):
            return
        columns = slice(self.local_columns.start, self.local_columns.stop)
        with torch.no_grad():
            # In blocks: all rows of the whole width at once would need more memory
            # than the table's part.
            for start in range(0, len(self.weight), _INIT_ROWS):
                block = self.weight[start : start + _INIT_ROWS]
                rows = normal_rows(
                    seed, self.first_row + start, len(block), self.dim, self.weight.device
                )
                block.copy_(rows[:, columns] * self.dim**-0.5)

    def forward(self, rows: Tensor, x: Tensor | None = None, product: bool = False) -> Tensor:
        """Return `weighted_sum(rows, x)`, `dot(rows, x)` with `product`, or `gather(rows)`."""
        if x is None:
            return self.gather(rows)
        return self.dot(rows, x) if product else self.weighted_sum(rows, x)

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return sum_j weights[t, j] * weight[rows[t, j]].

        rows: [tokens, reads] integers; weights: the same shape. Returns [tokens, dim], in the wider
        of the two dtypes once the table is hidden and in the table's before. Gradients to weights
        are exact; those to the table are dense, or collected once it is hidden.
        """
        check_reads(rows, weights.shape == rows.shape, weights)
        self._count(rows)
        return self._local_sum(rows.flatten(), weights.flatten(), bag_offsets(rows))

    def gather(self, rows: Tensor) -> Tensor:
        """Return weight[rows[t, j]], [tokens, reads, dim], fp32 at least once the table is hidden
        and in the table's dtype before. rows: [tokens, reads] integers.
        """
        # A sum of one row with a weight that needs no gradient: every layout knows those.
        single = rows.reshape(-1, 1)
        values = self.weighted_sum(single, torch.ones_like(single, dtype=torch.float32))
        return values.view(*rows.shape, self.dim)

    def dot(self, rows: Tensor, x: Tensor) -> Tensor:
        """Return x[t] . weight[rows[t, j]].

        rows: [tokens, reads] integers; x: [tokens, dim]. Returns [tokens, reads], in the wider of
        the two dtypes. Gradients to x are exact; those to the table as in `weighted_sum`.
        """
        check_reads(rows, x.shape[:1] == rows.shape[:1] and x.shape[1:] == (self.dim,), x)
        self._count(rows)
        return self._local_dot(rows.flatten(), x, bag_offsets(rows)).view(rows.shape)

    def _count(self, rows: Tensor) -> None:
        if self.hidden and torch.is_grad_enabled():
            self.check_optimizer()
            if self.reads and not self.settled:
                self.settle_reads()
            self.settled = False
            if self.weight.requires_grad and not isinstance(self.weight, nn.Parameter):
                raise NotImplementedError(
                    "a hidden table's values are a tensor that asks for a gradient and would get "
                    "none: leave them out of what torch.func.functional_call is given, or do not "
                    "hide the table; to let it learn, table.requires_grad_(True)"
                )
            # Counted where they are asked for: a split table's ranks serve one another's reads.
            self.reads_asked += rows.numel()

    def _local_sum(self, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """Return weighted sums of local rows, one for each bag, [bags, columns].

        rows, weights: [reads]; offsets: [bags].
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
        if self._only_values_wanted():
            return self.backend.gather_sum(self.weight, rows, weights, offsets)
        # Half the memory of what is kept until the update.
        rows = rows.to(torch.int32) if self.slots < 2**31 else rows
        fetch = self._worth_fetching(rows, offsets)
        sums: Tensor = (
            WeightedSum.apply(weights, self.autograd_handle, self, rows, offsets)
            if fetch is None
            else FetchedSum.apply(weights, self.autograd_handle, fetch)
        )
        return sums

    def _local_dot(self, rows: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        """Return products of local rows with their bag's x, [reads].

        rows: [reads]; x: [bags, columns]; offsets: [bags].
        """
        if self.observer is not None:
            self.observer.on_read(rows, x.new_ones(len(rows)))
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        if self._only_values_wanted():
            return self.backend.score_gradients(self.weight, rows, offsets, x)
        rows = rows.to(torch.int32) if self.slots < 2**31 else rows
        fetch = self._worth_fetching(rows, offsets)
        products: Tensor = (
            Dot.apply(x, self.autograd_handle, self, rows, offsets)
            if fetch is None
            else FetchedDot.apply(x, self.autograd_handle, fetch)
        )
        return products

    def _only_values_wanted(self) -> bool:
        """Return whether a compiler traces a read without gradients: it then gets plain torch.

        With gradients its graph ends here, since a table's gradient is collected in Python.
        """
        if not torch.compiler.is_compiling():
            return False
        if torch.compiler.is_exporting() or not torch.is_grad_enabled():
            return True
        compat.break_graph(
            "a hidden table collects its gradient in Python: leave out fullgraph=True, or compile "
            "for torch.no_grad(), or do not hide the table"
        )
        return False

    def _worth_fetching(self, rows: Tensor, offsets: Tensor) -> Fetch | None:
        """Return the distinct rows of a table in host memory, if fetching them moves fewer bytes
        than sending rows and weights there and each bag's sum back.
        """
        if not (self.host and self.hidden):
            return None
        backend, _ = backend_for(rows.device)
        order, distinct, starts = backend.sort_reads(rows, len(self.weight))
        if rows.is_cuda and len(rows):
            # The choice below needs their number, as the copies do.
            count = int(distinct.diff().count_nonzero()) + 1
            distinct, starts = distinct[:count], starts[: count + 1]
        dim = self.weight.shape[1]
        # Fetching: each distinct row and its number, and an fp32 gradient back. Pooling: number,
        # weight and its gradient for each read, a sum and its gradient for each bag.
        fetched = len(distinct) * (dim * (self.weight.itemsize + 4) + rows.itemsize)
        pooled = len(offsets) * dim * 8 + len(rows) * (rows.itemsize + 8)
        if fetched >= pooled:
            return None
        inverse = torch.empty_like(rows, dtype=torch.int32)
        inverse[order] = bag_of_each_read(starts[:-1], len(rows)).to(torch.int32)
        return Fetch(self, distinct, inverse, order, starts, offsets, backend)

    def gradients(self, scale: float | Tensor) -> Iterator[SortedReads]:
        """Yield the collected gradient times `scale`, in ascending parts without common rows.

        Gradients of micro-batches, of layers that share the table and of replicas are summed.
        """
        merged = sort_reads(self.reads, self.backend, len(self.weight))
        # None where nothing was read since the last step: no row is updated.
        if merged is not None:
            yield merged.scaled(scale)

    def gather_rows(self, x: Tensor, rows: Tensor, slots: int | None = None) -> Tensor:
        """Return x[rows] of a tensor that is split over ranks as a table's rows are.

        rows: [n] int64, of the whole table, of `slots` rows (default: as many as this one has).
        """
        return x[rows]

    def as_whole(self, part: Tensor) -> Tensor:
        """Return this rank's part of the table, or of a state with a number for each value or row,
        as a tensor of the whole table's shape, for a state dict; it shares the part's memory.
        """
        return part

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of what `as_whole` returned, or of a whole tensor of the table's
        shape. ValueError for anything else, such as another rank's part.
        """
        if hasattr(whole, "device_mesh"):
            raise ValueError(
                "it is one process's part of a table that several had split: save "
                "full_state_dict(model, optimizer) there, or use torch.distributed.checkpoint"
            )
        return whole

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        name = prefix + "weight"
        if name in state_dict:
            try:
                state_dict[name] = self.part_of(state_dict[name])
            except ValueError as error:
                errors.append(f"{name}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )

    @property
    def max_local_rows(self) -> int:
        """The number of rows of the rank that stores most."""
        return len(self.weight)

    def sum_over_shards(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks that split the table."""
        return x

    @property
    def local_row_count(self) -> int:
        """The number of rows of which this rank sees the reads."""
        return len(self.weight)


def bag_offsets(rows: Tensor) -> Tensor:
    """Return where each token's reads start in rows.flatten(): [tokens] int64.

    rows: [tokens, reads].
    """
    # Not len(rows), which would fix the number of tokens in an exported graph.
    return torch.arange(rows.shape[0], device=rows.device) * rows.shape[1]


def find_tables(model: nn.Module) -> Iterator[tuple[str, ValueTable]]:
    """Yield (name, table) for every table in the model.

    A table that several layers share comes once, under its first name. TypeError for what is no
    model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, ValueTable):
            yield name, module


def count_parameters(model: nn.Module) -> int:
    """Return the number of the model's weights, of which `parameters()` does not show the values in
    hidden tables. A table that is split over ranks counts whole.
    """
    tables = [table for _, table in find_tables(model) if table.hidden]
    shown = sum(weight.numel() for weight in model.parameters())
    return shown + sum(table.slots * table.dim for table in tables)


def externalize_tables(model: nn.Module) -> list[ValueTable]:
    """Hide all value tables of the model from `parameters()` and return them, for `RowAdam`.

    Call it before DDP or DeepSpeed wrap the model, which broadcast, cast and all-reduce whatever
    `parameters()` shows, and after PEFT, which copies layers. A frozen table stays frozen.
    ValueError if DDP or FSDP has wrapped visible tables already, or if values are tied to another
    module's parameter.
    """
    tables = [table for _, table in find_tables(model)]
    readers = [module for module in model.modules() if isinstance(module, TableReader)]
    visible = any(not table.hidden for table in tables)
    if visible and any(isinstance(part, DistributedDataParallel) for part in model.modules()):
        raise ValueError(
            "DDP waits for a gradient of every parameter that it has wrapped: hide or split tables "
            "before it wraps the model"
        )
    for module in model.modules():
        for table in tables:
            values = table._parameters.get("weight")
            others = module._parameters.values() if module is not table else ()
            if values is not None and any(weight is values for weight in others):
                raise ValueError(
                    f"a table's values are also the weight of a {type(module).__name__}, which "
                    "would learn apart from it once it is hidden: let layers share the table "
                    "itself, ProductKeyMemory(..., values=other.values), or do not hide it"
                )
    for table in tables:
        learns = [
            reader.learns for reader in readers if any(table is read for read in reader.tables)
        ]
        # Of several layers, one that learns says that a frozen table was frozen by itself.
        table.layer_learns = any(learns) or not learns
        table.hide()
    return tables
