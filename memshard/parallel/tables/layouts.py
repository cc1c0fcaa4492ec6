"""The layouts: the ways in which a table can be split over ranks, and what each of them costs.

A layout is one file, with a subclass of `ShardedTable`, and one row in `LAYOUTS`. Nothing else in
memshard names a layout: recipes, planner, opening screen and metrics ask the row. This file loads
no torch, because `memshard config show` and `memshard plan --help` read it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

_VALUE, _ID = 4, 4
"""Bytes of a sum, weight or gradient, and of a row number, when they are sent."""

SORTED_READ = 12
"""Bytes that a rank sends to another node while it sorts a read. An A100 sorts 29 billion keys of
32 bits a second (Adinets & Merrill 2022, arXiv 2206.01784), but with the place of each, 12 bytes in
place of 4, and weights brought in the same order it is some 5 billion reads: 0.2 ns, in which 25
GB/s are 5 bytes; an H200, estimated at 0.24 ns, has 50 GB/s. A core of a CPU takes 32 ns, measured,
at 1 GB/s.
"""


@dataclass(frozen=True)
class Lookup:
    """A weighted sum of rows of a split table: what the closed forms of a layout depend on.

    ranks: that split the table. value_dim: values in a row. reads: rows in the sum (of a token with
    product keys heads x topk; 1 where rows are taken as they are). duplicates: how often a rank
    reads a row in a micro-batch, of the rows it reads at all. row_bytes: of one stored value.
    weights_learn: whether weights get a gradient.
    """

    ranks: int
    value_dim: int
    reads: int
    duplicates: float = 1.0
    row_bytes: int = 4
    weights_learn: bool = True

    @property
    def others(self) -> int:
        """Number of other ranks."""
        return self.ranks - 1

    @property
    def share(self) -> float:
        """Share of something spread evenly that is on other ranks."""
        return self.others / self.ranks

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight and its gradient, each sent once."""
        return _VALUE * (2 if self.weights_learn else 1)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to split a table over P ranks. All closed forms are for one sum of a rank (with
    product keys that of a token) and one table, forward and backward.
    """

    name: str
    """Value of `parallel.layout`."""

    table: str
    """Import path of the `ShardedTable`, as module:Class."""

    description: str
    """What a rank stores and what it sends, for `memshard config explain`."""

    split_dim: int
    """Dim of the table that the ranks split: 0 rows, 1 columns."""

    sent: Callable[[Lookup], float]
    """Bytes that a rank sends."""

    sorted_reads: Callable[[Lookup], float]
    """Number of reads that a rank sorts: by owner when it asks, by row for the update."""

    kept: Callable[[Lookup], float]
    """Bytes that autograd keeps from forward to backward, not counting the row numbers and weights
    of the rank's tokens.
    """

    collected_reads: Callable[[Lookup], float]
    """Number of reads that a rank collects for its rows or columns until the optimizer step."""

    collected_bytes: Callable[[Lookup], float]
    """Bytes of the gradients of sums, and of where they begin, that those reads refer to."""

    within_tensor_group: bool = False
    """Whether the ranks of one tensor-parallel group split the table, all of them reading for all
    of the group's tokens. Else every rank of `parallel.memory` reads for tokens of its own.
    """

    narrowest_slice: int = 0
    """`auto` passes the layout over if a rank's slice of a row would have fewer bytes."""

    def cost(self, lookup: Lookup) -> float:
        """Return the bytes that a rank sends, and those that it could send while it sorts."""
        return self.sent(lookup) + SORTED_READ * self.sorted_reads(lookup)

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that split a table; along the others it is copied."""
        return ("tensor",) if self.within_tensor_group else ("memory", "tensor")

    def local_shape(self, slots: int, value_dim: int, ranks: int) -> tuple[int, int]:
        """Return the rows and columns of the largest shard."""
        shape = [slots, value_dim]
        shape[self.split_dim] = -(-shape[self.split_dim] // ranks)
        return shape[0], shape[1]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="rows",
            table="memshard.parallel.tables.rows:RowShardedTable",
            description="a rank stores a range of rows; reads go to it, a partial sum for each "
            "token comes back.",
            split_dim=0,
            # A sum and its gradient; (row, weight) and the weight's gradient; how many reads.
            sent=lambda x: (
                2 * x.others * x.value_dim * _VALUE
                + x.share * x.reads * (_ID + x.weight_bytes)
                + x.others * _ID
            ),
            sorted_reads=lambda x: 2 * x.reads,
            # Sort order, owners, rows and weights on both sides; lengths of the bags.
            kept=lambda x: 24 * x.reads + 24 * x.ranks,
            collected_reads=lambda x: x.reads,
            # One bag for each rank's part of the token.
            collected_bytes=lambda x: (4 * x.value_dim + 8.0) * x.ranks,
        ),
        Layout(
            name="rows-unique",
            table="memshard.parallel.tables.unique:UniqueRowTable",
            description="a rank stores a range of rows; it sends each row that another rank reads "
            "once, and gets the row's summed gradient back.",
            split_dim=0,
            # A row there, its gradient back, and its number, once for each distinct row.
            sent=lambda x: (
                x.share * x.reads / x.duplicates * (x.value_dim * (x.row_bytes + _VALUE) + _ID)
            ),
            sorted_reads=lambda x: 2 * x.reads,  # at most: owners get each row of a rank once
            # The fetched rows, as weights' gradients need them, and where each read finds its row.
            kept=lambda x: x.reads / x.duplicates * (4 * x.value_dim * x.weights_learn + 4),
            # An owner gets one bag, with its gradient, for each distinct row of each rank: as many
            # as a rank reads, if reads are evenly spread.
            collected_reads=lambda x: x.reads / x.duplicates,
            collected_bytes=lambda x: (4 * x.value_dim + 8.0) * (x.reads / x.duplicates),
        ),
        Layout(
            name="columns",
            table="memshard.parallel.tables.columns:ColumnShardedTable",
            description="a rank stores a slice of every row; reads go to all ranks, a slice of "
            "each token's sum comes back.",
            split_dim=1,
            # Slices of a sum and of its gradient; (row, weight) and the weight's
            # gradient for every rank.
            sent=lambda x: (
                2 * x.share * x.value_dim * _VALUE + x.others * x.reads * (_ID + x.weight_bytes)
            ),
            sorted_reads=lambda x: x.reads * x.ranks,
            # Row and weight of the other ranks' reads, 4 bytes each.
            kept=lambda x: 8 * x.reads * x.others,
            collected_reads=lambda x: x.reads * x.ranks,
            collected_bytes=lambda x: 4 * x.value_dim + 8.0 * x.ranks,
            # Two cache lines: rows are read in random order, and shorter slices waste bandwidth.
            narrowest_slice=128,
        ),
        Layout(
            name="tensor-columns",
            table="memshard.parallel.tables.tensor_columns:TensorColumnTable",
            description="the ranks of each parallel.tensor group, which look up the same tokens, "
            "store a slice of every row, and send no row numbers.",
            split_dim=1,
            # An all-gather of the sum's slices, an all-reduce of the weights' gradients.
            sent=lambda x: (
                x.share * (x.value_dim + (2 * x.reads if x.weights_learn else 0)) * _VALUE
            ),
            sorted_reads=lambda x: x.reads,
            kept=lambda x: 0,
            collected_reads=lambda x: x.reads,
            collected_bytes=lambda x: 4 * x.value_dim / x.ranks + 8.0,
            within_tensor_group=True,
        ),
    )
}

if TYPE_CHECKING:
    # mypy reads no computed Literal; at run time the recipe's check needs the names.
    LayoutName = str
else:
    LayoutName = Literal[tuple(LAYOUTS)]

Layouts = LayoutName | Mapping[str, LayoutName]
"""One layout for all tables, or one for those of each section of a model's settings (`memory`,
`ngram`).
"""


def layout_named(name: str) -> Layout:
    """Return the layout. ValueError with the choices for an unknown name."""
    if name not in LAYOUTS:
        raise ValueError(f"there is no table layout {name!r}: use one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
