"""Choose the layouts of a recipe's tables, and say why."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from memshard.models.memory.table_group import TableGroup
from memshard.parallel.tables.layouts import LAYOUTS, Layout, Lookup, layout_named
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.division import divide


@dataclass(frozen=True)
class LayoutChoice:
    """A layout and why.

    lookup: what the layout's closed forms are computed from. sent: bytes that a rank sends for one
    token and one table, forward and backward, in each layout that the recipe allows. sums: weighted
    sums of a token, each of which is a lookup.
    """

    name: str
    lookup: Lookup
    sent: dict[str, float]
    reason: str
    sums: int = 1

    @property
    def layout(self) -> Layout:
        """The layout's row in the registry."""
        return LAYOUTS[self.name]

    @property
    def kept(self) -> float:
        """Bytes for a token and a table that autograd keeps because the table is split."""
        return self.sums * self.layout.kept(self.lookup) if self.lookup.ranks > 1 else 0.0

    @property
    def collected(self) -> tuple[float, float]:
        """Reads, and bytes of gradients, that a token and a table add to those collected until the
        row update.
        """
        lookup, layout = self.lookup, self.layout
        if lookup.ranks == 1:
            reads, size = float(lookup.reads), 4 * lookup.value_dim + 8.0
        else:
            reads, size = layout.collected_reads(lookup), layout.collected_bytes(lookup)
        return self.sums * reads, self.sums * size


def layout_choice(
    recipe: Recipe, group: TableGroup, ranks: int, duplicates: float | None = None
) -> LayoutChoice:
    """Return how a group of the recipe's tables is split on `ranks` ranks.

    duplicates: how often a rank reads a row in a micro-batch, of the rows it reads, as measured; by
    default as if reads were spread evenly, so that the choice depends on the recipe alone.
    """
    division = divide(recipe, ranks)
    tokens = division.micro_batch * recipe.data.length / division.lookup_ranks
    lookup = Lookup(
        ranks=division.table_ranks,
        value_dim=group.value_dim,
        reads=group.reads if group.summed else 1,
        duplicates=duplicates or uniform_duplicates(tokens * group.reads, max(group.slots)),
        row_bytes=recipe.tables.value_bytes,
        weights_learn=group.summed,
    )
    return choose_layout(recipe.parallel.layout, lookup, 1 if group.summed else group.reads)


def layout_choices(
    recipe: Recipe,
    groups: list[TableGroup],
    ranks: int,
    duplicates: Mapping[str, float] | None = None,
) -> dict[str, LayoutChoice]:
    """Return the choice for each group, by its section; duplicates: as measured, by section."""
    measured = duplicates or {}
    return {
        group.section: layout_choice(recipe, group, ranks, measured.get(group.section))
        for group in groups
    }


def choose_layout(asked: str, lookup: Lookup, sums: int = 1) -> LayoutChoice:
    """Return the layout that a recipe asks for, or for `auto` the one that costs least, counted in
    bytes: those that a rank sends, and those that it could send while it sorts reads. sums: how
    many such lookups a token makes.

    `auto` leaves out layouts within tensor groups, where every rank also searches for the tokens of
    the others, and those whose slices of a row would be too narrow. ValueError for an unknown name.
    """
    if asked != "auto":
        sent = sums * layout_named(asked).sent(lookup)
        return LayoutChoice(asked, lookup, {asked: sent}, "as the recipe says", sums)
    # The listed order breaks ties, so the choice is the same on all ranks and versions.
    allowed = [layout for layout in LAYOUTS.values() if not layout.within_tensor_group]
    by_name = {layout.name: sums * layout.sent(lookup) for layout in allowed}
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
        f"{layout.name} {by_name[layout.name] / 1e3:,.1f} + "
        f"{sums * layout.sorted_reads(lookup):,.0f}"
        for layout in allowed
    )
    reason = (
        f"costs least; KB sent + reads sorted, a token: {listed}, at {lookup.duplicates:.1f} reads "
        "of a row"
    )
    if narrow:
        reason += f"; {' and '.join(narrow)} of {width} values would be too narrow"
    return LayoutChoice(best, lookup, by_name, reason, sums)


def uniform_duplicates(reads: float, slots: int) -> float:
    """Return reads over distinct rows, if `reads` are spread evenly over the slots.

    With batch-normalised queries 131k, 524k and 1,049k reads of 262k slots had 1.3, 2.5 and 4.3
    (this: 1.3, 2.3, 4.1).
    """
    # n reads of N slots leave a slot unread with probability e^(-n/N), so N (1
    # - e^(-n/N)) are read.
    density = max(reads, 1) / slots
    return density / -math.expm1(-density)
