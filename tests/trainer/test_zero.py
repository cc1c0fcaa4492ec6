"""ZeRO: moments split over ranks change no bit of a run."""

from pathlib import Path

import pytest

from memshard.trainer.optim.dense.build import owners
from memshard.trainer.resume import checkpoint_tensors
from tests.distributed import run_distributed
from tests.trainer.tiny_run import assert_same, checkpoint_state, prepare, train_run

SETTINGS = ("train.micro_batch=2", "train.clip=0.1")


def _whole_and_split(rank: int, world: int, recipe: Path, folder: Path) -> int:
    """Train ten steps without, with, and with ZeRO in the first half only; return how many values
    this rank keeps moments of.
    """
    train_run(recipe, folder / "whole", *SETTINGS)
    train_run(recipe, folder / "split", *SETTINGS, "train.zero=1")
    train_run(recipe, folder / "changed", *SETTINGS, "train.zero=1", stop_at=5)
    train_run(recipe, folder / "changed", *SETTINGS)
    run = prepare(recipe, folder / "split", *SETTINGS, "train.zero=1")
    assert run.progress.step == 10
    return sum(state["exp_avg"].numel() for state in run.engine.optimizer.state.values())


def test_split_moments_give_the_same_bits_and_load_anywhere(recipe: Path, tmp_path: Path) -> None:
    kept = run_distributed(_whole_and_split, 2, recipe, tmp_path)
    whole = checkpoint_state(tmp_path / "whole")
    for name in ("split", "changed"):
        assert_same(checkpoint_state(tmp_path / name), whole)
    alone = prepare(recipe, tmp_path / "split", *SETTINGS)
    tensors = checkpoint_tensors(alone)
    assert_same(
        {name: tensor for name, tensor in tensors.items() if name.startswith("exp_avg.")},
        {name: tensor for name, tensor in whole.items() if name.startswith("exp_avg.")},
    )
    assert sum(kept) == sum(p.numel() for p in alone.engine.parameters)
    assert max(kept) < 0.6 * sum(kept)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_states_are_spread_evenly(ranks: int) -> None:
    sizes = [100, 1, 1, 50, 50, 30, 20, 5]
    held = [
        sum(size for size, owner in zip(sizes, owners(sizes, ranks), strict=True) if owner == rank)
        for rank in range(ranks)
    ]
    assert sum(held) == sum(sizes) and max(held) <= max(100, sum(sizes) / ranks + 5)


def test_more_ranks_than_parameters() -> None:
    assert owners([4, 9], 4) == [1, 0]
