"""Divide the work and the weights of a recipe over ranks."""

import math
from dataclasses import dataclass

from memshard.parallel.mesh import memory_ranks, tensor_ranks
from memshard.parallel.tables.layouts import LAYOUTS
from memshard.trainer.config.recipe import Recipe


@dataclass(frozen=True)
class Division:
    """ranks: all of them. tensor_ranks: of a group that trains on the same sequences.

    matrix_ranks: that split the large matrices. sequence_ranks: that split each sequence from the
    embedding to the loss; one of the two is tensor_ranks, the other 1. table_ranks: that split a
    table. lookup_ranks: over which the lookups of a sequence are spread. sequences, micro_batch:
    of a rank in a step and in a micro-batch, at most.
    """

    ranks: int
    tensor_ranks: int
    matrix_ranks: int
    sequence_ranks: int
    table_ranks: int
    lookup_ranks: int
    sequences: int
    micro_batch: int

    @property
    def data_ranks(self) -> int:
        """Number of groups that train on different sequences."""
        return self.ranks // self.tensor_ranks

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step."""
        return math.ceil(self.sequences / self.micro_batch)


def divide(recipe: Recipe, ranks: int) -> Division:
    """Divide a recipe over ranks. ValueError if parallel.tensor or .memory does not divide them."""
    if ranks < 1:
        raise ValueError(f"the number of ranks is {ranks}; it must be at least 1")
    settings = recipe.parallel
    groups = ranks // tensor_ranks(settings.tensor, ranks)
    table_ranks = memory_ranks(settings.memory, ranks, settings.tensor)
    lookup_ranks = settings.tensor
    layout = LAYOUTS.get(settings.layout)
    if layout is not None and layout.within_tensor_group:
        # Columns are split, so each rank of a tensor group needs the reads of all its tokens.
        table_ranks, lookup_ranks = settings.tensor, 1
    by_sequence = settings.share == "sequence"
    sequences = math.ceil(recipe.train.batch / groups)
    return Division(
        ranks=ranks,
        tensor_ranks=settings.tensor,
        matrix_ranks=1 if by_sequence else settings.tensor,
        sequence_ranks=settings.tensor if by_sequence else 1,
        table_ranks=table_ranks,
        lookup_ranks=lookup_ranks,
        sequences=sequences,
        micro_batch=min(recipe.train.micro_batch or sequences, sequences),
    )
