"""Compute how many bytes a rank needs, in closed form."""

from dataclasses import dataclass, fields

from memshard.models.config import ModelConfig
from memshard.models.memory.kinds import MEMORIES, MemorySize
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.activations import activation_bytes
from memshard.trainer.cost.dense_bytes import dense_bytes
from memshard.trainer.cost.division import Division
from memshard.trainer.cost.layout_choice import LayoutChoice
from memshard.trainer.cost.parameters import Parameters, state_bytes
from memshard.trainer.optim.dense.kinds import DENSE_KINDS

_SORTED_READ = 44
"""Bytes of the row update's workspace for each read: row numbers and positions before and after
sorting, and weights.
"""


@dataclass(frozen=True)
class RankBytes:
    """Bytes on the rank that needs most.

    dense_weights: with the engine's copies in other precision. activations: what the forward pass
    of one micro-batch keeps. workspace: what backward (logits, scores, their gradients, what it
    computes again) or the row update (sorted reads) needs for a moment. reads: what is collected
    for the row update, of all the step's tokens.
    """

    dense_weights: float = 0.0
    dense_gradients: float = 0.0
    dense_moments: float = 0.0
    table_rows: float = 0.0
    table_moments: float = 0.0
    activations: float = 0.0
    workspace: float = 0.0
    reads: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all fields."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def dense(self) -> float:
        """Weights, gradients and moments of the dense parameters."""
        return self.dense_weights + self.dense_gradients + self.dense_moments

    @property
    def table(self) -> float:
        """Values and moments of the tables."""
        return self.table_rows + self.table_moments


def rank_bytes(
    recipe: Recipe,
    model: ModelConfig,
    division: Division,
    parameters: Parameters,
    layouts: dict[str, LayoutChoice],
    local_values: int,
    half: bool,
) -> tuple[RankBytes, RankBytes]:
    """Return what a rank needs on its device and in host memory.

    model: the recipe's, with vocabulary and length filled in. layouts: by section.
    local_values: values of all tables on the rank. half: under bf16 or fp16 autocast.
    """
    activations, backward = _activations_and_workspace(recipe, model, division, layouts, half)
    dense_device, dense_host = dense_bytes(
        recipe.train,
        DENSE_KINDS[recipe.optimizer.kind],
        parameters.dense_on_rank(division.tensor_ranks),
        parameters.largest / division.matrix_ranks,
        division.data_ranks,
        half,
    )
    # Reads are collected over all micro-batches of a step, activations over one.
    looked_up = division.sequences * recipe.data.length / division.lookup_ranks
    reads, update = _read_bytes(model, layouts)
    update *= looked_up
    table = {
        "table_rows": local_values * recipe.tables.value_bytes,
        "table_moments": local_values * recipe.tables.state_bytes,
        "reads": looked_up * reads,
    }
    device = {**dense_device, "activations": activations}
    if recipe.tables.place == "host":
        return (
            RankBytes(**device, workspace=backward),
            RankBytes(**table, **dense_host, workspace=update),
        )
    # The row update runs when the activations are gone, in their memory.
    return (
        RankBytes(**device, **table, workspace=max(backward, update - activations)),
        RankBytes(**dense_host),
    )


def _activations_and_workspace(
    recipe: Recipe,
    model: ModelConfig,
    division: Division,
    layouts: dict[str, LayoutChoice],
    half: bool,
) -> tuple[float, float]:
    """Return what forward keeps of a micro-batch, and what backward needs besides."""
    train, memory, length = recipe.train, recipe.model.memory, recipe.data.length
    tokens = division.micro_batch * length / division.sequence_ranks
    kept, again = activation_bytes(
        model,
        length,
        layouts,
        half=half,
        document_mask=recipe.data.document_mask,
        tensor=division.matrix_ranks,
        key_balance=train.key_balance > 0,
        checkpointing=train.checkpointing,
        chunk=train.chunk,
    )
    # Ranks that split sequences compute the head for their whole segment at once.
    whole_head = division.sequence_ranks > 1 and train.chunk > 0
    activations = tokens * (kept + 4 * model.logits_per_token * whole_head)
    scores = 0.0
    if memory.layers:
        search = MEMORIES[memory.kind].search_workspace(MemorySize(memory, model.dim))
        scores = search / division.lookup_ranks * division.sequence_ranks
    # Logits and their gradient, fp32.
    logits = 2 * 4 * model.logits_per_token / division.matrix_ranks
    chunk = min(1, train.chunk / length) if train.chunk else 1
    logits *= chunk if division.tensor_ranks == 1 else 1
    backward = tokens * max(logits, scores * chunk, again)
    if train.segments > 1:
        # Losses and states are kept, and one segment at a time is computed again.
        backward = (backward + activations) / train.segments
        activations = division.micro_batch * (8 * length + train.segments * state_bytes(model))
    return activations, backward


def _read_bytes(model: ModelConfig, layouts: dict[str, LayoutChoice]) -> tuple[float, float]:
    """Return, for each token of the step, the bytes collected by all tables' reads, and the bytes
    that the update of one table needs besides.
    """
    collected, update = 0.0, 0.0
    for group in model.table_groups:
        reads, gradients = layouts[group.section].collected
        # For each read a row number in int32 and an fp32 weight.
        collected += group.lookups * (8 * reads + gradients)
        update = max(update, group.layers_of_a_table * (_SORTED_READ * reads + gradients))
    return collected, update
