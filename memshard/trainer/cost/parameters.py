"""Count the parameters of a model, on a model without memory."""

import math
from dataclasses import dataclass, replace
from functools import cache

import torch

from memshard.models.config import ModelConfig
from memshard.models.layers.adaptive_softmax import AdaptiveHead
from memshard.models.memory.table import find_tables
from memshard.models.seq2seq import build_model
from memshard.parallel.tensor_placement import split_matrices
from memshard.trainer.carried_states import state_tensors
from memshard.trainer.config.recipe import Recipe


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. dense: all but the tables'. active: the dense ones that a token
    multiplies, so without embeddings that are looked up. largest: of the largest dense parameter.
    split: the dense ones that tensor-parallel ranks split. table: of all tables,
    whose number is `tables`.
    """

    dense: int
    largest: int
    active: int
    split: int
    table: int
    tables: int

    def dense_on_rank(self, tensor_ranks: int) -> int:
        """Return the number of dense parameters on a rank of a tensor-parallel group."""
        return self.dense - self.split + math.ceil(self.split / tensor_ranks)


def sized_model(recipe: Recipe, vocab_size: int) -> ModelConfig:
    """Return the recipe's model with what its data decides filled in, where the recipe is silent:
    `vocab_size` tokens, the longest sequence, and some token that ends documents.
    """
    model = replace(recipe.model, vocab_size=recipe.model.vocab_size or vocab_size)
    if model.ngram.layers and model.ngram.eos is None:
        model = replace(model, ngram=replace(model.ngram, eos=0))
    return model.for_length(recipe.data.length)


@cache
def count_parameters(config: ModelConfig) -> Parameters:
    """Count a model's parameters by building it on the meta device. `vocab_size` must be set, and
    `max_length` for learned positions.
    """
    # Tables draw a seed when they are built; the caller's generator must not notice.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(config)
    split = sum(model.get_parameter(name).numel() for name in split_matrices(model, 1))
    tables = [table for _, table in find_tables(model)]
    table = sum(table.weight.numel() for table in tables)
    dense = sum(parameter.numel() for parameter in model.parameters()) - table
    # A row that is looked up costs no multiplication; a tied embedding multiplies as the head.
    looked_up = [] if config.tie_head else list(model.embedding.parameters())
    if isinstance(model.head, AdaptiveHead):
        looked_up += model.head.tail.parameters()  # each multiplies the few tokens of its cluster
    if model.positions is not None:
        looked_up += model.positions.parameters()
    largest = max(
        parameter.numel()
        for parameter in model.parameters()
        if not any(parameter is table.weight for table in tables)
    )
    active = dense - sum(parameter.numel() for parameter in looked_up)
    return Parameters(
        dense=dense, largest=largest, active=active, split=split, table=table, tables=len(tables)
    )


@cache
def state_bytes(config: ModelConfig) -> int:
    """Return the bytes of all mixers' states for one sequence, where they do not grow with it."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        states = build_model(config).init_states(1, 0)
    return sum(tensor.nbytes for state in states for tensor in state_tensors(state).values())
