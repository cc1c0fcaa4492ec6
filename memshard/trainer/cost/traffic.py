"""Compute what a rank sends besides lookups, in closed form."""

from collections.abc import Mapping

from memshard.models.config import ModelConfig
from memshard.models.memory.table_group import TableGroup
from memshard.models.mixers.kinds import LayerSize
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.dense_bytes import dense_traffic
from memshard.trainer.cost.division import Division
from memshard.trainer.cost.parameters import Parameters


def tensor_traffic(model: ModelConfig, division: Division, length: int, half: bool) -> float:
    """Return the bytes that a rank sends within its tensor group for one token of its sequences."""
    if division.sequence_ranks > 1:
        return _state_traffic(model, division.tensor_ranks, length)
    return _matrix_traffic(model, division.tensor_ranks, 2 if half else 4)


def gradient_traffic(
    recipe: Recipe, division: Division, parameters: Parameters, half: bool
) -> float:
    """Return the bytes that a rank sends in a step to sum dense gradients and, with ZeRO, to gather
    parameters afterwards.
    """
    tensor = division.tensor_ranks
    # Gradients of what the tensor axis does not split are summed along it, in fp32.
    along_tensor = 8 * sent_share(tensor) * (parameters.dense - parameters.split)
    return (
        dense_traffic(
            recipe.train,
            parameters.dense_on_rank(tensor),
            division.data_ranks,
            division.micro_batches,
            half,
        )
        + along_tensor
    )


def replica_traffic(
    recipe: Recipe, division: Division, groups: list[TableGroup], local_values: Mapping[str, int]
) -> float:
    """Return the bytes that a rank sends in a step to sum row gradients over copies of its tables,
    if reads are spread evenly. local_values: of each group's tables on the rank.
    """
    tokens = recipe.train.batch * recipe.data.length
    summed = sum(group.touched(tokens) * local_values[group.section] for group in groups)
    copies = division.ranks // division.table_ranks
    # fp32, once to the rank that sums a part and once back.
    return 8 * sent_share(copies) * summed


def sent_share(ranks: int) -> float:
    """Return what a rank sends of each byte in an all-gather, or in half an all-reduce."""
    return (ranks - 1) / ranks


def _matrix_traffic(model: ModelConfig, ranks: int, value_bytes: int) -> float:
    """Return the bytes of gathers and sums around each mixer and feedforward, forward and backward,
    and around head and embedding (whose sum is fp32).
    """
    # A memory in place of a feedforward gathers nothing.
    memories = len(model.memory.layers) if model.memory.mode == "replace" else 0
    ngrams = len(model.ngram.layers) if model.ngram.place == "replace" else 0
    halves = 2 * model.layers - memories - ngrams
    return sent_share(ranks) * model.dim * (value_bytes * (4 * halves + 2) + 12)


def _state_traffic(model: ModelConfig, ranks: int, length: int) -> float:
    """Return the bytes of states that the mixers send (see `parallel/segments.py`)."""
    size = LayerSize(model.mixer, model.dim, length, ranks=ranks)
    forms = [model.mixer.kind_of(layer).sequence_bytes for layer in range(model.layers)]
    return sum(form(size) for form in forms if form is not None)
