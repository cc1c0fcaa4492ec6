"""Estimate what a run costs, in closed form: parameters, bytes on a rank, bytes sent, operations.

Nothing is allocated.
"""

from dataclasses import dataclass, replace

import torch

from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.bytes import RankBytes, rank_bytes
from memshard.trainer.cost.division import divide
from memshard.trainer.cost.layout_choice import LayoutChoice, layout_choice
from memshard.trainer.cost.operations import flops_per_token
from memshard.trainer.cost.parameters import Parameters, count_parameters
from memshard.trainer.cost.this_machine import available_memory
from memshard.trainer.cost.traffic import gradient_traffic, replica_traffic, tensor_traffic


@dataclass(frozen=True)
class Estimate:
    """The costs of a run on `ranks` ranks.

    tensor_ranks, memory_ranks, lookup_ranks: how many ranks train on the same sequences, split a
    table, and share the lookups of a sequence. table_part: rows and columns of each table on a
    rank. bytes, host: on a rank's device and in host memory. micro_batch: sequences that a rank
    processes at once. lookup_traffic: bytes that a rank sends for each token it looks up, forward
    and backward. tensor_traffic: for each token of its sequences, within a tensor group.
    gradient_traffic, replica_traffic: in a step, for dense gradients (with ZeRO also parameters)
    and for row gradients between copies of a table.
    """

    ranks: int
    tensor_ranks: int
    memory_ranks: int
    lookup_ranks: int
    parameters: Parameters
    table_part: tuple[int, int]
    layout: LayoutChoice
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
    recipe: Recipe, world: int, vocab_size: int, half: bool = False, duplicates: float | None = None
) -> Estimate:
    """Return what a recipe costs on `world` ranks.

    vocab_size: where model.vocab_size is not set. half: under bf16 or fp16 autocast. duplicates: as
    measured (see `layout_choice`). ValueError where sizes do not divide.
    """
    length, memory = recipe.data.length, recipe.model.memory
    division = divide(recipe, world)
    model = replace(recipe.model, vocab_size=recipe.model.vocab_size or vocab_size)
    model = model.for_length(length)
    parameters = count_parameters(model)
    if division.sequence_ranks > 1:
        # Ranks that share sequences have whole matrices.
        parameters = replace(parameters, split=0)
    layout = layout_choice(recipe, world, duplicates)
    shard = layout.layout.local_shape(
        memory.slots, memory.value_dim or model.dim, division.table_ranks
    )
    local_values = parameters.tables * shard[0] * shard[1]
    device, host = rank_bytes(recipe, model, division, parameters, layout, local_values, half)
    return Estimate(
        ranks=world,
        tensor_ranks=division.tensor_ranks,
        memory_ranks=division.table_ranks,
        lookup_ranks=division.lookup_ranks,
        parameters=parameters,
        table_part=shard if parameters.tables else (0, 0),
        layout=layout,
        bytes=device,
        host=host,
        micro_batch=division.micro_batch,
        micro_batches=division.micro_batches,
        tokens_per_step=recipe.train.batch * length,
        flops_per_token=flops_per_token(model, length),
        lookup_traffic=len(memory.layers) * memory.tables * layout.sent[layout.name],
        tensor_traffic=tensor_traffic(model, division, length, half),
        gradient_traffic=gradient_traffic(recipe, division, parameters, half),
        replica_traffic=replica_traffic(recipe, division, local_values),
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
        raise ValueError(
            f"the value table needs {needed / 1e9:,.1f} GB a rank (values and moments) and "
            f"{max(available, 0) / 1e9:,.1f} GB are "
            "available: lower model.memory.keys, or use more "
            f"ranks{', or set tables.place=host' if place.type == 'cuda' else ''}"
        )
