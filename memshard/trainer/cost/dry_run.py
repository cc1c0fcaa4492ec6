"""Set a recipe up as one rank of many, in this process and without memory: on torch's fake process
group and meta tensors.
"""

import sys
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from memshard.models.config import ModelConfig
from memshard.models.memory.table import find_tables
from memshard.models.seq2seq import build_model
from memshard.parallel.apply import apply
from memshard.parallel.mesh import build_mesh
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.estimate import layout_choice
from memshard.trainer.cost.traffic import LayoutChoice


@dataclass(frozen=True)
class Part:
    """Numbers of parameters that a rank would hold."""

    rank: int
    dense: int
    table: int


def rehearse(recipe: Recipe, ranks: int, vocab_size: int) -> list[Part]:
    """What the first and the last of `ranks` ranks would hold, after building mesh, model,
    tensor-parallel split and tables as in training.

    ValueError that names the key where something does not divide. Not to be called in a process
    that has joined others.
    """
    assert not dist.is_initialized(), "this process has joined other ranks"
    layout = layout_choice(recipe, ranks)
    longest = recipe.model.longest(recipe.data.length)
    config = replace(
        recipe.model, vocab_size=recipe.model.vocab_size or vocab_size, max_length=longest
    )
    return [_part(recipe, config, rank, ranks, layout) for rank in sorted({0, ranks - 1})]


def _part(recipe: Recipe, config: ModelConfig, rank: int, ranks: int, layout: LayoutChoice) -> Part:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        mesh = build_mesh("cpu", recipe.parallel.memory, recipe.parallel.tensor)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build_model(config)
        apply(model, mesh, layout.layout, layout.exchange, recipe.parallel.share)
        dense = sum(parameter.numel() for parameter in model.parameters())
        return Part(rank, dense, sum(table.weight.numel() for _, table in find_tables(model)))
    finally:
        if tensor := sys.modules.get("memshard.parallel.tensor"):
            tensor.leave()
        dist.destroy_process_group()
