"""Build a recipe's model as one rank of many, in this process and without memory: on torch's fake
process group and meta tensors.
"""

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from memshard.models.config import ModelConfig
from memshard.models.memory.table import find_tables
from memshard.models.seq2seq import build_model
from memshard.parallel.apply import apply
from memshard.parallel.compat import init_fake_group
from memshard.parallel.mesh import build_mesh
from memshard.parallel.tables.layouts import Layouts
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.layout_choice import layout_choices
from memshard.trainer.cost.parameters import sized_model


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters that a rank would store."""

    rank: int
    dense: int
    table: int


def dry_run(recipe: Recipe, ranks: int, vocab_size: int) -> list[RankParameters]:
    """Build mesh, model, tensor-parallel split and tables as in training, as the first and as the
    last of `ranks` ranks, and return what the two would store; nothing if torch cannot fake ranks.

    ValueError that names the key where something does not divide. Must not be called in a process
    that has joined others.
    """
    assert not dist.is_initialized(), "this process has joined other ranks"
    config = sized_model(recipe, vocab_size)
    choices = layout_choices(recipe, config.table_groups, ranks)
    layout = {section: choice.name for section, choice in choices.items()}
    # Only the last ranks' shards may be smaller: the first and the last rank are the extremes.
    parts = (_as_rank(recipe, config, rank, ranks, layout) for rank in sorted({0, ranks - 1}))
    return [part for part in parts if part is not None]


def _as_rank(
    recipe: Recipe, config: ModelConfig, rank: int, ranks: int, layout: Layouts
) -> RankParameters | None:
    if not init_fake_group(rank, ranks):
        return None
    try:
        mesh = build_mesh("cpu", recipe.parallel.memory, recipe.parallel.tensor)
        # Tables draw a seed even on the meta device; the caller's generator must not notice.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build_model(config)
        apply(model, mesh, layout, recipe.parallel.share)
        dense = sum(parameter.numel() for parameter in model.parameters())
        return RankParameters(
            rank, dense, sum(table.weight.numel() for _, table in find_tables(model))
        )
    finally:
        # Imported only where parallel.tensor is used, as it needs fairscale, whose
        # groups are globals.
        if tensor := sys.modules.get("memshard.parallel.tensor"):
            tensor.leave()
        dist.destroy_process_group()
