"""What the layouts' closed forms promise: tables count the bytes that they send, and the planner
chooses by them.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from memshard.models.config import MemoryConfig, ModelConfig, NgramConfig
from memshard.models.memory.table import ValueTable
from memshard.parallel.tables.layouts import LAYOUTS, Lookup, layout_named
from memshard.parallel.tables.shard_tables import shard_tables
from memshard.parallel.tables.sharded import ShardedTable
from memshard.trainer.config.recipe import DataConfig, ParallelConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.layout_choice import (
    choose_layout,
    layout_choices,
    uniform_duplicates,
)
from tests.distributed import run_distributed

SPREAD = [name for name, layout in LAYOUTS.items() if not layout.within_tensor_group]
"""Layouts whose ranks read for tokens of their own."""

SMALL, WIDE = Lookup(2, 36, 8), Lookup(2, 1024, 128)


def _sent_bytes(rank: int, world: int) -> dict[tuple[str, bool], tuple[int, float]]:
    """Return the bytes that this rank really sends to others for a read of 48 tokens and its
    backward, and how often it read a row; by layout, and whether rows are taken as they are.
    """
    sent = 0
    exchange = dist.all_to_all_single

    def counted(
        out: Tensor, x: Tensor, out_sizes: list[int], in_sizes: list[int], group: dist.ProcessGroup
    ) -> Any:
        nonlocal sent
        row = x.element_size() * (x.numel() // max(len(x), 1))
        sent += row * (sum(in_sizes) - in_sizes[rank])
        return exchange(out, x, out_sizes, in_sizes, group)

    dist.all_to_all_single = counted  # type: ignore[assignment]
    measured = {}
    for name, gathered in product(SPREAD, (False, True)):
        (table,) = shard_tables(
            torch.nn.Sequential(ValueTable(slots=64, dim=SMALL.value_dim)), layout=name
        )
        rows = torch.randint(64, (48, 8), generator=torch.Generator().manual_seed(rank))
        before = sent
        if gathered:
            table.gather(rows).sum().backward()
        else:
            table.weighted_sum(rows, torch.rand(48, 8, requires_grad=True)).sum().backward()
        assert isinstance(table, ShardedTable) and table.duplicates is not None
        assert table.layout is LAYOUTS[name]
        assert table.traffic.reads == pytest.approx(sent - before, rel=0.01)
        measured[name, gathered] = (table.traffic.reads, table.duplicates)
    return measured


@pytest.mark.parametrize("world", [2, 3])
def test_traffic_is_what_the_ranks_send(world: int) -> None:
    for measured in run_distributed(_sent_bytes, world):
        for name in SPREAD:
            counted, duplicates = measured[name, False]
            lookup = replace(SMALL, ranks=world, duplicates=duplicates)
            # Rows do not divide by 3, so ranks differ a little.
            assert counted == pytest.approx(48 * LAYOUTS[name].sent(lookup), rel=0.05), name
            counted, duplicates = measured[name, True]
            single = replace(lookup, reads=1, weights_learn=False, duplicates=duplicates)
            assert counted == pytest.approx(48 * 8 * LAYOUTS[name].sent(single), rel=0.05), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_whole_table_sends_nothing(layout: Any) -> None:
    assert layout.sent(replace(SMALL, ranks=1)) == 0


@pytest.mark.parametrize(
    ("ranks", "duplicates", "expected"),
    [(2, 1.0, "columns"), (64, 1.0, "rows"), (64, 16.0, "rows-unique"), (8, 16.0, "columns")],
)
def test_the_layout_that_costs_least_is_chosen(
    ranks: int, duplicates: float, expected: str
) -> None:
    choice = choose_layout("auto", replace(WIDE, ranks=ranks, duplicates=duplicates))
    assert choice.name == expected and expected in choice.reason
    costs = {name: LAYOUTS[name].cost(choice.lookup) for name in choice.sent}
    others = {**costs, "columns": float("inf")} if choice.name != "columns" else costs
    assert costs[expected] == min(others.values())


def test_the_choice_knows_that_columns_sort_the_reads_of_all_ranks() -> None:
    choice = choose_layout("auto", Lookup(ranks=8, value_dim=512, reads=256))
    assert choice.name == "rows" and choice.sent["columns"] < choice.sent["rows"]
    assert "columns 25.1 + 2,048" in choice.reason and "rows 31.4 + 512" in choice.reason


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_recipe_can_ask_for_a_layout(name: str) -> None:
    choice = choose_layout(name, WIDE)
    assert choice.name == name and choice.reason == "as the recipe says"
    assert choose_layout(name, Lookup(64, 64, 128)).name == name  # however narrow the slices


def test_a_whole_table_takes_the_layout_that_sorts_nothing() -> None:
    assert choose_layout("auto", replace(WIDE, ranks=1)).name == "columns"
    assert choose_layout("auto", replace(WIDE, ranks=1, value_dim=16)).name == "rows"


@pytest.mark.parametrize(("ranks", "dim"), [(8, 160), (64, 256)])
def test_narrow_rows_that_are_taken_as_they_are_are_sent_once(ranks: int, dim: int) -> None:
    """Sizes of published tables, whose tokens read 16 rows."""
    lookup = Lookup(ranks, dim, 1, row_bytes=2, weights_learn=False)
    choice = choose_layout("auto", lookup, 16)
    assert choice.name == "rows-unique"
    assert choice.sent["rows-unique"] == 16 * (ranks - 1) / ranks * (dim * (2 + 4) + 4)
    # An owner answers for each read of a rank, mostly with zeros.
    assert choice.sent["rows"] > 2 * (ranks - 1) * 16 * dim * 4


def test_each_kind_of_table_has_a_layout_of_its_own() -> None:
    memory = MemoryConfig(layers=(1,), keys=512)
    ngram = NgramConfig(layers=(0, 2), rows=100_000, value_dim=64)
    model = ModelConfig(vocab_size=1000, dim=1024, memory=memory, ngram=ngram)
    recipe = Recipe(data=DataConfig(path="nowhere"), model=model, train=TrainConfig(batch=64))
    choices = layout_choices(recipe, model.table_groups, 8)
    assert {section: choice.name for section, choice in choices.items()} == {
        "memory": "columns",
        "ngram": "rows-unique",
    }
    named = replace(recipe, parallel=ParallelConfig(layout="rows"))
    choices = layout_choices(named, model.table_groups, 8)
    assert {choice.name for choice in choices.values()} == {"rows"}
    repeated = layout_choices(recipe, model.table_groups, 8, {"ngram": 3.0})
    assert repeated["ngram"].lookup.duplicates == 3.0
    assert repeated["memory"] == layout_choices(recipe, model.table_groups, 8)["memory"]


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(ValueError, match="no table layout 'diagonal': use one of rows, "):
        layout_named("diagonal")


@pytest.mark.parametrize(
    ("reads", "measured"),
    [(256 * 128, 1.1), (1024 * 128, 1.3), (4096 * 128, 2.5), (8192 * 128, 4.3)],
)
def test_duplicates_of_batch_normalised_queries(reads: int, measured: float) -> None:
    """They are compared with reads of a 512^2 memory that were counted."""
    assert uniform_duplicates(reads, 512**2) == pytest.approx(measured, rel=0.1)
