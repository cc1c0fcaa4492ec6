"""A gradient that is not finite, on any rank, leaves every rank as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.launch.cli.main import main
from memshard.trainer.run import Run
from memshard.trainer.step import train_step
from tests.distributed import run_distributed
from tests.trainer.tiny_run import TABLE, assert_same, prepare, snapshot

SETTINGS = ("train.micro_batch=2", "train.max_skipped=2", "model.memory.query_norm=lagged")


def _poisoned(run: Run, poison: Callable[[Run], None]) -> Callable[[Tensor, float], None]:
    """Return the engine's backward, after which a gradient on the last rank is not finite."""
    backward = type(run.engine).backward

    def wrapped(loss: Tensor, scale: float) -> None:
        backward(run.engine, loss, scale)
        if run.rank == run.ranks - 1:
            poison(run)

    return wrapped


def _poison_dense(run: Run) -> None:
    gradient = run.engine.parameters[-1].grad
    assert gradient is not None
    gradient[0] = float("inf")


def _poison_read(run: Run) -> None:
    """Leave a table as backward does where a kept read is not finite."""
    assert run.table_optimizer is not None
    table = run.table_optimizer.tables[0]
    table.reads[-1].upstream[0, 0] = float("nan")
    assert table.anchor.grad is not None
    table.anchor.grad.fill_(float("nan"))


def _skip_and_go_on(rank: int, world: int, recipe: Path, folder: Path) -> dict[str, Any]:
    """Steps 2 and 4 of the run have a bad gradient; its reference does not know them."""
    run = prepare(recipe, folder, *SETTINGS)
    reference = prepare(recipe, folder, *SETTINGS)
    train_step(run)
    train_step(reference)
    for number, poison in enumerate((_poison_dense, _poison_read), 1):
        before = snapshot(run)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.engine, "backward", _poisoned(run, poison))
            outcome = train_step(run)
        assert outcome.rate == 0
        assert_same(snapshot(run), before)
        assert (run.progress.step, run.progress.skipped, run.progress.in_a_row) == (
            2 * number,
            number,
            1,
        )
        reference.progress.step += 1
        train_step(run)
        train_step(reference)
        after = snapshot(run)
        assert_same(after, snapshot(reference))
        assert run.progress.in_a_row == 0 and run.progress.skipped == number
        for name in (
            "model.embedding.weight",
            "model.blocks.1.memory.query_norm.running_mean",
            f"exp_avg.{TABLE}.weight",
        ):
            assert not torch.equal(after[name], before[name]) and after[name].isfinite().all(), name
        assert after[TABLE] == before[TABLE] + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.engine, "backward", _poisoned(run, _poison_read))
        train_step(run)
        train_step(run)
        with pytest.raises(
            RuntimeError,
            match=r"^3 steps in a row, up to step 8, had a gradient that is not finite.*: begin",
        ):
            train_step(run)
    return {name: value for name, value in snapshot(run).items() if ".values." not in name}


@pytest.mark.parametrize("world", [1, 2])
def test_a_bad_gradient_on_one_rank_is_skipped_on_all(
    world: int, recipe: Path, tmp_path: Path
) -> None:
    if world == 1:
        _skip_and_go_on(0, 1, recipe, tmp_path / "run")
    else:
        first, second = run_distributed(_skip_and_go_on, 2, recipe, tmp_path / "run")
        assert_same(first, second)


def test_a_run_that_diverges_ends_with_exit_code_1(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "train",
        str(recipe),
        "--run",
        str(tmp_path / "run"),
        "optimizer.lr=1e38",
        "train.steps=30",
        "--json",
    ]
    assert main(argv) == 1
    error = json.loads(capfd.readouterr().out)["error"]
    assert "steps in a row, up to step" in error and "lower optimizer.lr" in error
    assert "Traceback" in (tmp_path / "run/log/rank0.log").read_text()
