"""Choose the table layout that a recipe uses, and say why."""

import math
from dataclasses import dataclass

from memshard.parallel.tables.layouts import LAYOUTS, Layout, Lookup, layout_named
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.division import divide


@dataclass(frozen=True)
class LayoutChoice:
    """A layout and why.

    lookup: what the layout's closed forms are computed from. sent: bytes that a rank sends for one
    token and one table, forward and backward, in each layout that the recipe allows.
    """

    name: str
    lookup: Lookup
    sent: dict[str, float]
    reason: str

    @property
    def layout(self) -> Layout:
        """The layout's row in the registry."""
        return LAYOUTS[self.name]

    @property
    def kept(self) -> float:
        """Bytes for a token and a table that autograd keeps because the table is split."""
        return self.layout.kept(self.lookup) if self.lookup.ranks > 1 else 0.0

    @property
    def collected(self) -> tuple[float, float]:
        """Reads, and bytes of gradients, that a token and a table add to those collected until the
        row update.
        """
        if self.lookup.ranks == 1:
            return float(self.lookup.reads), 4 * self.lookup.value_dim + 8.0
        return (
            float(self.layout.collected_reads(self.lookup)),
            self.layout.collected_bytes(self.lookup),
        )


def layout_choice(recipe: Recipe, ranks: int, duplicates: float | None = None) -> LayoutChoice:
    """Return how the recipe's tables are split on `ranks` ranks.

    duplicates: how often a rank reads a row in a micro-batch, of the rows it reads, as measured; by
    default as if reads were spread evenly, so that the choice depends on the recipe alone.
    """
    memory, division = recipe.model.memory, divide(recipe, ranks)
    reads = memory.reads
    tokens = division.micro_batch * recipe.data.length / division.lookup_ranks
    lookup = Lookup(
        ranks=division.table_ranks,
        value_dim=memory.value_dim or recipe.model.dim,
        reads=reads,
        duplicates=duplicates or uniform_duplicates(tokens * reads, memory.slots),
        row_bytes=recipe.tables.value_bytes,
    )
    return choose_layout(recipe.parallel.layout, lookup)


def choose_layout(asked: str, lookup: Lookup) -> LayoutChoice:
    """Return the layout that a recipe asks for, or for `auto` the one that costs least, counted in
    bytes: those that a rank sends, and those that it could send while it sorts reads.

    `auto` leaves out layouts within tensor groups, where every rank also searches for the tokens of
    the others, and those whose slices of a row would be too narrow. ValueError for an unknown name.
    """
    if asked != "auto":
        sent = layout_named(asked).sent(lookup)
        return LayoutChoice(asked, lookup, {asked: sent}, "as the recipe says")
    # The listed order breaks ties, so the choice is the same on all ranks and versions.
    allowed = [layout for layout in LAYOUTS.values() if not layout.within_tensor_group]
    by_name = {layout.name: layout.sent(lookup) for layout in allowed}
    width = lookup.value_dim // lookup.ranks
    narrow = [
        layout.name for layout in allowed if width * lookup.row_bytes < layout.narrowest_slice
    ]
    # A slice below two cache lines would waste bandwidth of memory. On one rank all send nothing,
    # and columns sort no reads by their owner.
    best = min(
        (layout for layout in allowed if layout.name not in narrow),
        key=lambda layout: layout.cost(lookup),
    ).name
    listed = ", ".join(
        f"{layout.name} {by_name[layout.name] / 1e3:,.1f} + {layout.sorted_reads(lookup):,.0f}"
        for layout in allowed
    )
    reason = (
        f"costs least; KB sent + reads sorted, a token: {listed}, at {lookup.duplicates:.1f} reads "
        "of a row"
    )
    if narrow:
        reason += f"; {' and '.join(narrow)} of {width} values would be too narrow"
    return LayoutChoice(best, lookup, by_name, reason)


def uniform_duplicates(reads: float, slots: int) -> float:
    """Return reads over distinct rows, if `reads` are spread evenly over the slots.

    With batch-normalised queries 131k, 524k and 1,049k reads of 262k slots had 1.3, 2.5 and 4.3
    (this: 1.3, 2.3, 4.1).
    """
    # n reads of N slots leave a slot unread with probability e^(-n/N), so N (1
    # - e^(-n/N)) are read.
    density = max(reads, 1) / slots
    return density / -math.expm1(-density)
