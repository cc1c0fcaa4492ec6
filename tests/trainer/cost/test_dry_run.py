from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig
from memshard.trainer.config.load import load_recipe
from memshard.trainer.config.recipe import DataConfig, ParallelConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.alternatives import changed_by
from memshard.trainer.cost.dry_run import dry_run
from memshard.trainer.cost.estimate import estimate

MODEL = ModelConfig(
    layers=4,
    dim=256,
    mixer=MixerConfig(heads=8),
    memory=MemoryConfig(layers=(1,), keys=64, topk=8, heads=4),
)
RECIPE = Recipe(data=DataConfig(path="nowhere"), model=MODEL, train=TrainConfig(batch=64))


@pytest.mark.parametrize(
    ("tensor", "memory", "layout"),
    [(1, None, "auto"), (2, 64, "columns"), (4, None, "tensor-columns"), (8, 128, "rows")],
)
def test_1024_ranks_in_one_process_store_what_is_estimated(
    tensor: int, memory: int | None, layout: Any
) -> None:
    recipe = replace(
        load_recipe("lample2019", []),
        parallel=ParallelConfig(tensor=tensor, memory=memory, layout=layout),
    )
    cost, parts = estimate(recipe, 1024, 30_000, half=True), dry_run(recipe, 1024, 30_000)
    assert not dist.is_initialized() and [part.rank for part in parts] == [0, 1023]
    dense = cost.parameters.dense - cost.parameters.split * (1 - 1 / tensor)
    for part in parts:
        assert part.dense == pytest.approx(dense, rel=1e-3)
        assert part.table == cost.tables["memory"].part[0] * cost.tables["memory"].part[1]


@pytest.mark.parametrize(("name", "ranks"), [("ngram-320m", 8), ("ngram-384m", 64)])
def test_published_tables_of_n_grams_are_stored_as_estimated(name: str, ranks: int) -> None:
    recipe = load_recipe(name, [])
    cost, parts = estimate(recipe, ranks, 0, half=True), dry_run(recipe, ranks, 0)
    whole = cost.tables["ngram"].group
    assert cost.tables["ngram"].layout.name == "rows-unique"
    for part in parts:
        # The last rank has fewer rows, where they do not divide.
        assert part.table == pytest.approx(cost.tables["ngram"].values, rel=1e-5)
        assert part.table == pytest.approx(sum(whole.slots) * whole.value_dim / ranks, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"parallel.tensor": 3}, "parallel.tensor is 3, which does not divide the number of ranks"),
        ({"parallel.memory": 24}, "parallel.memory is 24, which does not divide"),
        (
            {"parallel.tensor": 16},
            "model.mixer.heads is 8, which parallel.tensor, 16, does not divide",
        ),
        (
            {"parallel.tensor": 8, "parallel.memory": 4},
            "parallel.memory is 4 and parallel.tensor 8",
        ),
    ],
)
def test_what_does_not_divide_is_named(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        dry_run(changed_by(RECIPE, values), 1024, 1000)
    assert not dist.is_initialized()
