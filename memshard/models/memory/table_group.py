"""The sizes that the costs of value tables depend on. Loads no torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TableGroup:
    """The value tables of one section of a model's settings, which are all read in the same way.

    section: its name, `memory` or `ngram`. slots: rows of each table. value_dim: values in a row.
    reads: rows of a table that a token reads in a layer. lookups: how often a token reads some
    table, over all layers. summed: whether those rows become one weighted sum, whose weights learn;
    else each is taken as it is, and all layers that share a table take the same. size_key: the
    recipe key that decides the number of rows.
    """

    section: str
    slots: tuple[int, ...]
    value_dim: int
    reads: int
    lookups: int
    summed: bool
    size_key: str

    @property
    def tables(self) -> int:
        """Number of tables."""
        return len(self.slots)

    @property
    def layers_of_a_table(self) -> int:
        """How often a token reads one table."""
        return self.lookups // self.tables

    def touched(self, tokens: float) -> float:
        """Return the share of the rows that so many tokens read, if reads are spread evenly."""
        reads = tokens * self.reads * (self.layers_of_a_table if self.summed else 1)
        # Of N slots, e^(-n/N) stay unread after n reads.
        return -math.expm1(-reads * self.tables / sum(self.slots))
