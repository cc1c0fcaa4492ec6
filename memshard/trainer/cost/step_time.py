"""How long a step should take: a simple model of arithmetic, memory and network, one after the
other.
"""

import math
from dataclasses import dataclass

from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.devices import Device
from memshard.trainer.cost.estimate import Estimate

PRODUCTS, BANDWIDTH, NETWORK = 0.4, 0.5, 0.6
"""Shares of the best figures that are assumed: of operations (what runs between matrix products
included), of memory bandwidth (rows are read in random order), of links.
"""

_AGAIN = {"none": 1.0, "selective": 10 / 9, "full": 4 / 3}
_HOST_MEMORY, _HOST_LINK = 25e9, 12e9
"""Bytes a second: a rank's share of the memory of a node of 8, and of PCIe 3.0; assumed."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. products: matrix products. tables: reads and updates of rows. update: of
    dense parameters. network: all that ranks send. Nothing overlaps, so a run should be a little
    faster, and much slower where data or a slow rank hold it up.
    """

    products: float
    tables: float
    update: float
    network: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.products + self.tables + self.update + self.network


def step_time(
    recipe: Recipe, cost: Estimate, device: Device, precision: str, node: int
) -> StepTime:
    """The seconds of a step.

    products    operations of the model, a third more with full checkpointing or reversible blocks,
    a ninth with selective tables      a read takes a row forward, a row and a gradient of the sum
    backward; a row that was read is updated: value and
                states once in, once out; in host memory sums and their gradients also cross PCIe
    update      28 bytes a dense parameter that this rank updates network     of dense gradients
    each node sends its share over all its adapters, of lookups each rank what leaves its node;
                tensor-parallel ranks are neighbours

    node: ranks on a node. ValueError if the device lacks the precision.
    """
    if precision not in device.flops:
        raise ValueError(
            f"train.precision is {precision}, which a {device.name} does not have: use "
            f"{', '.join(device.flops)}"
        )
    model, world = recipe.model, cost.ranks
    again = 4 / 3 if model.residual == "reversible" else _AGAIN[recipe.train.checkpointing]
    products = (
        again
        * cost.flops_per_token
        * cost.tokens_per_step
        / world
        / (device.flops[precision] * PRODUCTS)
    )

    memory, width = model.memory, model.memory.value_dim or model.dim
    reads = cost.tokens_per_step * memory.heads * memory.topk * memory.tables  # of one layer
    layers_of_a_table = len(memory.layers) if memory.share else 1
    touched = (
        -math.expm1(-reads / memory.tables * layers_of_a_table / memory.slots)
        if memory.layers
        else 0.0
    )
    moved = len(memory.layers) * reads / world * width * (2 * recipe.tables.value_bytes + 4)
    moved += (
        cost.parameters.tables
        * math.prod(cost.table_part)
        * touched
        * 2
        * (recipe.tables.value_bytes + recipe.tables.state_bytes)
    )
    in_host = recipe.tables.place == "host"
    tables = moved / (_HOST_MEMORY if in_host else device.bandwidth * BANDWIDTH)
    tokens = cost.tokens_per_step / world * cost.tensor_ranks
    if in_host:
        tables += len(memory.layers) * tokens * 2 * 4 * width / _HOST_LINK
    moments = 28 / 8
    update = moments * (
        cost.bytes.dense_moments / (device.bandwidth * BANDWIDTH)
        + cost.host.dense_moments / _HOST_MEMORY
    )

    link, network = device.link * NETWORK, device.network * NETWORK
    sums = cost.gradient_traffic + cost.replica_traffic
    sending = sums / link if world <= node else max(sums / link, sums / (network * node))
    holders, lookups = cost.memory_ranks, cost.lookup_traffic * cost.tokens_per_step / world
    outside = max(0, holders - node) / max(1, holders - 1)
    sending += lookups * max(outside / network, (1 - outside) / link)
    sending += cost.tensor_traffic * tokens / (link if cost.tensor_ranks <= node else network)
    return StepTime(products, tables, update, sending)
