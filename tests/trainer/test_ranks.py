"""The number of ranks, the layout of tables, and the number of micro-batches change nothing
but the speed.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from memshard.trainer.loop import evaluate_run
from memshard.trainer.resume import checkpoint_tensors
from memshard.trainer.run import Run
from tests.distributed import run_distributed
from tests.trainer.tiny_run import TABLE, assert_same, checkpoint_state, numbers, prepare, train_run

LONG = (
    "train.steps=50",
    "train.eval_every=10",
    "train.save_every=10",
    "train.keep=9",
    "optimizer.lr=3e-3",
)
SAVED = "step-00000010"
FEW = ("train.batch=2", "data.length=16", "train.micro_batch=1", "model.memory.query_norm=layer")


def _copy_with_one_checkpoint(run: Path, copy: Path) -> None:
    """Copy the run as it was at step 10."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if path.name != SAVED:
            shutil.rmtree(path)


def load_whole(recipe: Path, folder: Path, *settings: str) -> dict[str, Any]:
    """Return the tensors that a run resumes with on these ranks, whole."""
    return _whole(prepare(recipe, folder, *settings))


def _whole(run: Run) -> dict[str, Any]:
    tensors = checkpoint_tensors(run)
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in tensors.items()
    }


def _load(recipe: Path, folder: Path, *layout: str) -> dict[str, Any]:
    """Return what a checkpoint saved on two ranks becomes on these: whole tensors,
    and its evaluation.
    """
    run = prepare(recipe, folder, *LONG, *layout)
    evaluation = evaluate_run(run)
    return {
        **_whole(run),
        "loss": evaluation.loss,
        **{name: asdict(report) for name, report in evaluation.usage.items()},
    }


def _three_ranks(rank: int, world: int, recipe: Path, folder: Path) -> dict[str, Any]:
    loaded = _load(recipe, folder / "on 3", "parallel.layout=columns")
    train_run(recipe, folder / "on 3", *LONG, "parallel.layout=columns", stop_at=20)
    train_run(recipe, folder / "3 ranks", *LONG, "parallel.layout=rows-unique", stop_at=10)
    # Every rank with a copy of the table.
    train_run(recipe, folder / "3 ranks, few rows", *FEW, "parallel.memory=1")
    return loaded


def _two_ranks(rank: int, world: int, recipe: Path, folder: Path) -> None:
    train_run(recipe, folder / "2 ranks", *LONG)


@pytest.fixture(scope="module")
def runs(
    recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Return the folder of all runs, and what one rank and each of three loaded of the
    two ranks' checkpoint.
    """
    folder = tmp_path_factory.mktemp("runs")
    run_distributed(_two_ranks, 2, recipe, folder)
    for name in ("on 1", "on 3"):
        _copy_with_one_checkpoint(folder / "2 ranks", folder / name)
    train_run(recipe, folder / "1 rank", *LONG)
    train_run(recipe, folder / "1 rank, few rows", *FEW)
    return folder, [
        _load(recipe, folder / "on 1"),
        *run_distributed(_three_ranks, 3, recipe, folder),
    ]


def losses(folder: Path, steps: int) -> list[float]:
    values = numbers(folder, "train/loss")
    return [values[step] for step in range(1, steps + 1)]


def test_losses_do_not_depend_on_the_number_of_ranks(
    runs: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, _ = runs
    one = losses(folder / "1 rank", 50)
    assert one[-1] < one[0] - 1
    assert losses(folder / "2 ranks", 10) == pytest.approx(one[:10], rel=1e-5)
    assert losses(folder / "2 ranks", 50) == pytest.approx(one, rel=1e-4)
    # Eight sequences on three ranks: one is a filler.
    assert losses(folder / "3 ranks", 10) == pytest.approx(one[:10], rel=1e-5)


def test_table_metrics_do_not_depend_on_ranks_and_layouts(
    runs: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, _ = runs
    for key in ("touched", "duplicates", "never_updated", "dead"):
        one = numbers(folder / "1 rank", f"blocks.0.memory.values/{key}")
        for other, step in (("2 ranks", 1), ("3 ranks", 1), ("on 3", 11)):
            assert numbers(folder / other, f"blocks.0.memory.values/{key}")[step] == pytest.approx(
                one[step], rel=1e-3
            ), (key, other)
    few = (
        numbers(folder / f"{ranks}, few rows", "blocks.0.memory.values/touched")[1]
        for ranks in ("1 rank", "3 ranks")
    )
    assert next(few) == pytest.approx(next(few))


def test_a_rank_may_have_nothing_to_do(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    """Three ranks share two sequences."""
    folder, _ = runs
    assert losses(folder / "3 ranks, few rows", 10) == pytest.approx(
        losses(folder / "1 rank, few rows", 10), rel=1e-5
    )


def test_a_checkpoint_of_two_ranks_loads_on_one_and_three(
    runs: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, everywhere = runs
    saved = checkpoint_state(folder / "2 ranks/checkpoints" / SAVED)
    names = [name for name in saved if name.startswith(("model.", "exp_avg", "step."))]
    for loaded in everywhere:
        assert_same({name: loaded[name] for name in names}, {name: saved[name] for name in names})


def test_training_goes_on_with_the_same_losses(
    runs: tuple[Path, list[dict[str, Any]]], recipe: Path
) -> None:
    folder, _ = runs
    train_run(recipe, folder / "on 1", *LONG, stop_at=20)
    for name in ("on 1", "on 3"):
        assert losses(folder / name, 20) == pytest.approx(losses(folder / "2 ranks", 20), rel=1e-5)


def test_evaluation_does_not_depend_on_the_number_of_ranks(
    runs: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, everywhere = runs
    for loaded in everywhere:
        assert loaded["loss"] == pytest.approx(
            numbers(folder / "2 ranks", "eval/loss")[10], rel=1e-6
        )
        for key, value in loaded[TABLE].items():
            assert value == pytest.approx(
                numbers(folder / "2 ranks", f"{TABLE}/{key}")[10], rel=1e-9
            ), key


@pytest.mark.parametrize("query_norm", ["layer", "rms"])
def test_micro_batches_change_nothing_where_queries_are_normalised_alone(
    query_norm: str, recipe: Path, tmp_path: Path
) -> None:
    norm = f"model.memory.query_norm={query_norm}"
    train_run(recipe, tmp_path / "whole", norm)
    train_run(recipe, tmp_path / "micro", norm, "train.micro_batch=3")
    assert losses(tmp_path / "micro", 10) == pytest.approx(losses(tmp_path / "whole", 10), rel=1e-5)


PASSES = (
    "train.batch=10",
    "train.log_every=1",
    "model.dropout=0.1",
    "optimizer.eps=1e-3",
    "parallel.layout=rows",
)


def _passes_on(rank: int, world: int, recipe: Path, folder: Path) -> None:
    for query_norm in ("batch", "lagged"):
        train_run(
            recipe,
            folder / f"{world} ranks {query_norm}",
            *PASSES,
            f"train.micro_batch={4 // world}",
            f"model.memory.query_norm={query_norm}",
        )


def test_a_pass_normalises_queries_over_the_same_rows_on_any_number_of_ranks(
    recipe: Path, tmp_path: Path
) -> None:
    """Ten rows in passes of four: 1 x 4, 2 x 2 and 4 x 1, of which the last pass leaves two ranks
    without a row.
    """
    _passes_on(0, 1, recipe, tmp_path)
    for world in (2, 4):
        run_distributed(_passes_on, world, recipe, tmp_path)
    for query_norm in ("batch", "lagged"):
        alone = tmp_path / f"1 ranks {query_norm}"
        state = checkpoint_state(alone)
        for world in (2, 4):
            folder = tmp_path / f"{world} ranks {query_norm}"
            for key in ("train/loss", "train/grad_norm"):
                assert numbers(folder, key) == pytest.approx(numbers(alone, key), rel=2e-5), key
            for name, value in checkpoint_state(folder).items():
                if "running" in name:
                    torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)
