"""A checkpoint of any layout loads into any other, to the last bit."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.trainer.test_ranks import load_whole
from tests.trainer.tiny_run import assert_same, checkpoint_state, train_run

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1": (1, ()),
    "2 by columns": (2, ("parallel.layout=columns",)),
    "3 by rows, unique": (3, ("parallel.layout=rows-unique",)),
    "4 by rows": (4, ()),
    "2 copies of 2": (4, ("parallel.memory=2",)),
    "tensor 2, data 2": (4, ("parallel.tensor=2",)),
}


def _save(rank: int, world: int, recipe: Path, folder: Path, settings: tuple[str, ...]) -> None:
    train_run(recipe, folder, "train.steps=2", *settings)


def _load(
    rank: int, world: int, recipe: Path, folder: Path, settings: tuple[str, ...]
) -> dict[str, Any]:
    return load_whole(recipe, folder, "train.steps=2", *settings)


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["4 by rows", "tensor 2, data 2", "2 by columns"])
def test_tables_moments_and_weights_are_bit_equal(saved: str, recipe: Path, tmp_path: Path) -> None:
    ranks, settings = LAYOUTS[saved]
    run_distributed(_save, ranks, recipe, tmp_path, settings)
    expected = checkpoint_state(tmp_path)
    names = [
        name for name in expected if name.startswith(("model.", "exp_avg", "step.", "last_step"))
    ]
    assert len(names) > 20
    for layout, (ranks, settings) in LAYOUTS.items():
        if layout != saved:
            loaded = run_distributed(_load, ranks, recipe, tmp_path, settings)
            for of_rank in loaded:
                assert_same(
                    {name: of_rank[name] for name in names},
                    {name: expected[name] for name in names},
                )
