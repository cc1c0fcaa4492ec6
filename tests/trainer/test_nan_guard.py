"""A gradient that is not finite, on any rank, leaves every rank as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.launch.cli.main import main
from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.loop import train
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


@pytest.mark.parametrize("where", ["dense", "row"])
def test_weights_that_are_not_finite_push_no_checkpoint_out(
    where: str, recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a dense weight, no step counts any more; a row that is never read spoils no gradient."""
    settings = ("train.save_every=2", "train.max_skipped=3", "train.steps=12")
    settings += ("model.memory.query_norm=layer", "model.memory.keys=64")
    whole = prepare(recipe, tmp_path / "whole", *settings)
    train(whole)
    run = prepare(recipe, tmp_path / "run", *settings)
    train(run, stop_at=4)
    if where == "dense":
        run.engine.parameters[-1].data[0] = float("nan")
        problem = "steps in a row"
    else:
        assert whole.table_optimizer is not None and run.table_optimizer is not None
        last_read = whole.table_optimizer.state[whole.table_optimizer.tables[0].anchor]["last_step"]
        run.table_optimizer.tables[0].weight[int(last_read.argmin())] = float("-inf")
        problem = "a weight is not finite after step"
    with pytest.raises(RuntimeError, match=problem):
        train(run)
    saved = [path.name for path in committed(tmp_path / "run/checkpoints")]
    assert saved == ["step-00000002", "step-00000004"]
    assert "a weight is not finite after step 6: nothing was saved" in caplog.text or (
        where == "dense"
    )
    caplog.clear()
    resumed = prepare(recipe, tmp_path / "run", *settings)
    assert resumed.progress.step == 4
    assert train(resumed)["finished"]


def test_no_step_that_was_skipped_is_saved(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save waits for the next step that counts."""
    run = prepare(recipe, tmp_path / "run", "train.save_every=4", "train.keep=9")

    def poison(run: Run) -> None:
        if run.progress.step in (3, 4):
            _poison_dense(run)

    monkeypatch.setattr(run.engine, "backward", _poisoned(run, poison))
    train(run)
    saved = [int(path.name[5:]) for path in committed(tmp_path / "run/checkpoints")]
    assert run.progress.skipped == 2 and saved == [6, 8, 10]
