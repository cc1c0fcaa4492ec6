"""Estimate what a run costs, in closed form: parameters, bytes on a rank, bytes sent, operations.

Nothing is allocated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from memshard.models.memory.table_group import TableGroup
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.bytes import RankBytes, rank_bytes
from memshard.trainer.cost.division import divide
from memshard.trainer.cost.layout_choice import LayoutChoice, layout_choices
from memshard.trainer.cost.operations import flops_per_token
from memshard.trainer.cost.parameters import Parameters, count_parameters, sized_model
from memshard.trainer.cost.this_machine import available_memory
from memshard.trainer.cost.traffic import gradient_traffic, replica_traffic, tensor_traffic


@dataclass(frozen=True)
class TableCost:
    """How a group of tables is split. part: rows and columns of its largest table on a rank;
    values: of all its tables there. lookup_traffic: bytes that a rank sends for each token it looks
    up in them, forward and backward.
    """

    group: TableGroup
    layout: LayoutChoice
    part: tuple[int, int]
    values: int
    lookup_traffic: float


@dataclass(frozen=True)
class Estimate:
    """The costs of a run on `ranks` ranks.

    tensor_ranks, memory_ranks, lookup_ranks: how many ranks train on the same sequences, split a
    table, and share the lookups of a sequence. tables: by the section that describes them. bytes,
    host: on a rank's device and in host memory. micro_batch: sequences that a rank processes at
    once. lookup_traffic: bytes that a rank sends for each token it looks up, forward and backward,
    in all tables. tensor_traffic: for each token of its sequences, within a tensor group.
    gradient_traffic, replica_traffic: in a step, for dense gradients (with ZeRO also parameters)
    and for row gradients between copies of a table.
    """

    ranks: int
    tensor_ranks: int
    memory_ranks: int
    lookup_ranks: int
    parameters: Parameters
    tables: dict[str, TableCost]
    bytes: RankBytes
    host: RankBytes
    micro_batch: int
    micro_batches: int
    tokens_per_step: int
    flops_per_token: float
    lookup_traffic: float
    tensor_traffic: float
    gradient_traffic: float
    replica_traffic: float


def estimate(
    recipe: Recipe,
    world: int,
    vocab_size: int,
    half: bool = False,
    duplicates: Mapping[str, float] | None = None,
) -> Estimate:
    """Return what a recipe costs on `world` ranks.

    vocab_size: where model.vocab_size is not set. half: under bf16 or fp16 autocast. duplicates: as
    measured, by section (see `layout_choice`). ValueError where sizes do not divide.
    """
    length, division = recipe.data.length, divide(recipe, world)
    model = sized_model(recipe, vocab_size)
    parameters = count_parameters(model)
    if division.sequence_ranks > 1:
        # Ranks that share sequences have whole matrices.
        parameters = replace(parameters, split=0)
    groups = model.table_groups
    choices = layout_choices(recipe, groups, world, duplicates)
    tables = {
        group.section: _table_cost(group, choices[group.section], division.table_ranks)
        for group in groups
    }
    values = {section: cost.values for section, cost in tables.items()}
    device, host = rank_bytes(
        recipe, model, division, parameters, choices, sum(values.values()), half
    )
    return Estimate(
        ranks=world,
        tensor_ranks=division.tensor_ranks,
        memory_ranks=division.table_ranks,
        lookup_ranks=division.lookup_ranks,
        parameters=parameters,
        tables=tables,
        bytes=device,
        host=host,
        micro_batch=division.micro_batch,
        micro_batches=division.micro_batches,
        tokens_per_step=recipe.train.batch * length,
        flops_per_token=flops_per_token(model, length),
        lookup_traffic=sum(cost.lookup_traffic for cost in tables.values()),
        tensor_traffic=tensor_traffic(model, division, length, half),
        gradient_traffic=gradient_traffic(recipe, division, parameters, half),
        replica_traffic=replica_traffic(recipe, division, groups, values),
    )


def _table_cost(group: TableGroup, choice: LayoutChoice, ranks: int) -> TableCost:
    parts = [
        choice.layout.local_shape(slots, group.value_dim, ranks)
        for slots in sorted(group.slots, reverse=True)
    ]
    return TableCost(
        group,
        choice,
        parts[0],
        sum(rows * columns for rows, columns in parts),
        group.lookups * choice.sent[choice.name],
    )


def check_fits(recipe: Recipe, world: int, vocab_size: int, device: torch.device) -> None:
    """Raise ValueError if the dense model does not fit into the memory of a rank's device, or a
    rank's part of the tables, together with it, into the memory that is available where they are.
    """
    cost = estimate(recipe, world, vocab_size)
    if (dense := cost.bytes.dense) > (memory := available_memory(device)):
        raise ValueError(
            f"the dense model needs {dense / 1e9:,.1f} GB a rank (weights, gradients and moments) "
            f"and {memory / 1e9:,.1f} GB are available: lower model.dim, model.layers or "
            "model.vocab_size, or see `memshard plan`"
        )
    # Only what does not depend on the batch: activations may still be made to fit.
    needed = cost.bytes.table + cost.host.table
    # The dense model takes from the same memory only where the tables are on its device.
    place = torch.device("cpu") if recipe.tables.place == "host" else device
    available = available_memory(place) - (cost.bytes.dense if place.type == device.type else 0)
    if needed > available:
        keys = [table.group.size_key for table in cost.tables.values()]
        raise ValueError(
            f"the value table needs {needed / 1e9:,.1f} GB a rank (values and moments) and "
            f"{max(available, 0) / 1e9:,.1f} GB are "
            f"available: lower {' or '.join(keys)}, or use more "
            f"ranks{', or set tables.place=host' if place.type == 'cuda' else ''}"
        )
