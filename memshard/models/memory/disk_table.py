"""A value table that stays on disk, for evaluation: only the rows that are read are loaded."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memshard.models.kernels.backend import backend_for
from memshard.models.memory.table import ValueTable, bag_offsets, find_tables

_BLOCK_READS = 1 << 14
"""Reads whose rows are loaded at a time: 64 MB of 1,024 fp32 values, if all rows are distinct."""


class MappedTable(ValueTable):
    """slots x dim values that `read_rows` loads, as from a memory-mapped file; without gradients.

    read_rows: takes rows [n] int64 on the CPU, ascending, and returns their values [n, dim], in
    floating point.
    """

    def __init__(self, slots: int, dim: int, read_rows: Callable[[Tensor], Tensor]) -> None:
        # No values in memory; `read_rows` has them.
        super().__init__(slots, dim, local_rows=range(0))
        self.read_rows = read_rows
        # Nobody trains it, and `parameters()` would show 0 rows.
        self.hide()

    @property
    def local_row_count(self) -> int:
        """All rows: they are loaded on demand."""
        return self.slots

    @torch.no_grad()
    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Do what `ValueTable.weighted_sum` does."""
        sums = [weights.new_zeros(0, self.dim)]
        for rows_here, weights_here in self._blocks(rows, weights):
            values, inverse = self._read(rows_here, weights_here)
            weights_here = weights_here.to(torch.promote_types(weights.dtype, values.dtype))
            backend, _ = backend_for(values.device)
            sums.append(
                backend.gather_sum(values, inverse, weights_here.flatten(), bag_offsets(rows_here))
            )
        return torch.cat(sums)

    @torch.no_grad()
    def dot(self, rows: Tensor, x: Tensor) -> Tensor:
        """Do what `ValueTable.dot` does."""
        products = [x.new_zeros(0, rows.shape[1])]
        for rows_here, x_here in self._blocks(rows, x):
            # Only an observer looks at these weights; a product has none, so every read counts 1.
            values, inverse = self._read(
                rows_here, rows_here.new_ones(rows_here.shape, dtype=torch.float32)
            )
            x_here = x_here.to(torch.promote_types(x.dtype, values.dtype))
            backend, _ = backend_for(values.device)
            flat = backend.score_gradients(values, inverse, bag_offsets(rows_here), x_here)
            products.append(flat.view(rows_here.shape))
        return torch.cat(products)

    def _blocks(self, rows: Tensor, of_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        tokens = max(1, _BLOCK_READS // max(1, rows.shape[1]))
        return (
            # split() of no rows would yield one empty part, for which no file should be asked.
            list(zip(rows.split(tokens), of_tokens.split(tokens), strict=True)) if len(rows) else []
        )

    def _read(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of the distinct rows, and which of them each read is."""
        if self.observer is not None:
            self.observer.on_read(rows.flatten(), weights.flatten())
        distinct, inverse = torch.unique(rows.flatten(), return_inverse=True)
        # Ascending and distinct, so a file is read forwards and no page twice.
        return self.read_rows(distinct.cpu()).to(rows.device), inverse


def replace_tables(model: nn.Module, new: dict[str, ValueTable]) -> None:
    """Replace tables, by the names that `find_tables` yields, in all layers that read them."""
    # By identity: a shared table has one name here and is an attribute of several layers.
    replaced = {model.get_submodule(name): table for name, table in new.items()}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in replaced:
                setattr(module, name, replaced[child])


def map_tables(model: nn.Module, readers: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Replace all tables of the model by `MappedTable`s.

    readers: the `read_rows` of each, by the names that `find_tables` yields.
    """
    replace_tables(
        model,
        {
            name: MappedTable(table.slots, table.dim, readers[name])
            for name, table in find_tables(model)
        },
    )
