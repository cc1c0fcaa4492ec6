"""Estimate how long a step takes, if arithmetic, memory and network work one after the other."""

from dataclasses import dataclass

from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.dense_bytes import updated_values
from memshard.trainer.cost.devices import Device
from memshard.trainer.cost.division import divide
from memshard.trainer.cost.estimate import Estimate
from memshard.trainer.optim.dense.kinds import DENSE_KINDS

PRODUCTS, BANDWIDTH, NETWORK = 0.4, 0.5, 0.6
"""Assumed shares of the peak figures: operations (including what runs between matrix products),
memory bandwidth (rows are read in random order), links.
"""

# Backward costs two forward passes, so a third one is 1/3 more. The feedforward's first matrix has
# 4 of the 12 d^2 weights of a block: 1/9.
_AGAIN = {"none": 1.0, "selective": 10 / 9, "full": 4 / 3}
_HOST_MEMORY, _HOST_LINK = 25e9, 12e9
"""Assumed bytes a second for a rank: its share of the memory of a node of 8, and of PCIe 3.0."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: matrix products, reads and updates of table rows, the update of dense
    parameters, and all that ranks send.

    Nothing overlaps here, so a real step should be a little faster; it is much slower where it
    waits for data or for a slow rank.
    """

    products: float
    tables: float
    update: float
    network: float

    @property
    def total(self) -> float:
        """Sum of the four."""
        return self.products + self.tables + self.update + self.network


def step_time(
    recipe: Recipe, cost: Estimate, device: Device, precision: str, node: int
) -> StepTime:
    """Return the seconds of a step.

    products    operations of the model; a third more with full checkpointing or reversible blocks,
                a ninth more with selective checkpointing
    tables      a read moves a row forward, and a row and a gradient of the sum backward; a row that
                was read is updated: value and states are read once and written once; for tables in
                host memory, sums (n-grams: rows) and their gradients also cross PCIe
    update      the optimizer's bytes for each dense value that this rank updates
    network     each node sends its share of dense gradients over all its adapters, each rank the
                lookups that leave its node; tensor-parallel ranks are neighbours

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

    tables = _table_seconds(recipe, cost, device)
    tokens = cost.tokens_per_step / world * cost.tensor_ranks
    division = divide(recipe, world)
    updated = updated_values(
        recipe.train,
        cost.parameters.dense_on_rank(division.tensor_ranks),
        cost.parameters.largest / division.matrix_ranks,
        division.data_ranks,
    )
    update = (
        updated
        * DENSE_KINDS[recipe.optimizer.kind].update_bytes
        / (_HOST_MEMORY if recipe.train.offload else device.bandwidth * BANDWIDTH)
    )

    link, network = device.link * NETWORK, device.network * NETWORK
    sums = cost.gradient_traffic + cost.replica_traffic
    sending = sums / link if world <= node else max(sums / link, sums / (network * node))
    holders, lookups = cost.memory_ranks, cost.lookup_traffic * cost.tokens_per_step / world
    # The share of lookups that leave the node; those inside go over NVLink at the same time.
    outside = max(0, holders - node) / max(1, holders - 1)
    sending += lookups * max(outside / network, (1 - outside) / link)
    sending += cost.tensor_traffic * tokens / (link if cost.tensor_ranks <= node else network)
    return StepTime(products, tables, update, sending)


def _table_seconds(recipe: Recipe, cost: Estimate, device: Device) -> float:
    """Return the seconds in which a rank reads and updates the rows of its part of the tables."""
    stored, states = recipe.tables.value_bytes, recipe.tables.state_bytes
    tokens, moved, over_link = cost.tokens_per_step / cost.ranks, 0.0, 0.0
    for table in cost.tables.values():
        group = table.group
        # Of a sum, backward reads the row again for the weight; of a row taken as it is, sum and
        # gradient are as large as the row.
        read = 2 * stored + 4 if group.summed else stored + 2 * 4
        moved += group.lookups * tokens * group.reads * group.value_dim * read
        moved += table.values * group.touched(cost.tokens_per_step) * 2 * (stored + states)
        sent = 2 * 4 if group.summed else group.reads * (stored + 4)
        over_link += group.lookups * sent * group.value_dim
    if recipe.tables.place != "host":
        return moved / (device.bandwidth * BANDWIDTH)
    return moved / _HOST_MEMORY + over_link * tokens * cost.tensor_ranks / _HOST_LINK
