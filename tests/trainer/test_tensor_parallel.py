"""Whole runs whose ranks share matrices and sequences: the numbers of one process, checkpoints for any layout, clear refusals."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import memshard
from memshard.launch.cli.main import main
from memshard.models.decode.generate import generate
from memshard.trainer.step import train_step
from tests.distributed import run_distributed
from tests.trainer.tiny_run import TABLE, assert_same, checkpoint_state, numbers, prepare, train_run

# A vocabulary that does not divide by 2; layer 0 keeps its feedforward.
SETTINGS = ("model.memory.layers=[1]", "model.vocab_size=301", "train.eval_every=5", "train.save_every=5", "train.keep=9")
TWO, COLUMNS = "parallel.tensor=2", "parallel.layout=tensor"
VALUES = TABLE.replace("0", "1")


def _leave() -> None:
    sys.modules["memshard.parallel.tensor"].leave()  # type: ignore[attr-defined]


def _two_ranks(rank: int, world: int, recipe: Path, folder: Path) -> str:
    """Runs on two ranks; returns what a rank says whose copy of a weight has changed."""
    train_run(recipe, folder / "rows", *SETTINGS, TWO)
    train_run(recipe, folder / "columns", *SETTINGS, TWO, COLUMNS, "train.micro_batch=4", "model.memory.query_norm=layer")
    # On from what one process saved.
    train_run(recipe, folder / "resumed", *SETTINGS, TWO)
    train_run(recipe, folder / "odd", *SETTINGS, TWO, "data.length=31")
    run = prepare(recipe, folder / "drifts", *SETTINGS, TWO, "parallel.checksum_every=2")
    if rank == 1:
        run.model.blocks[0].mixer_residual.norm.weight.data[3] += 1e-6
    train_step(run)
    try:
        train_step(run)
    except RuntimeError as error:
        return str(error)
    finally:
        _leave()
    return ""


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("tensor")
    train_run(recipe, folder / "alone", *SETTINGS)
    train_run(recipe, folder / "alone, layer", *SETTINGS, "train.micro_batch=4", "model.memory.query_norm=layer")
    train_run(recipe, folder / "alone, odd", *SETTINGS, "data.length=31")
    shutil.copytree(folder / "alone", folder / "resumed")
    shutil.rmtree(folder / "resumed/checkpoints/step-00000010")
    return folder, run_distributed(_two_ranks, 2, recipe, folder)


@pytest.mark.parametrize(("run", "alone"), [("rows", "alone"), ("resumed", "alone"), ("columns", "alone, layer"), ("odd", "alone, odd")])
def test_the_numbers_are_those_of_one_process(runs: tuple[Path, list[str]], run: str, alone: str) -> None:
    folder, _ = runs
    # Which slots are read, and so how evenly, turns on the last bits of fp32 scores.
    rough = {f"{VALUES}/{key}": 2e-2 for key in ("usage", "kl_weighted", "touched", "duplicates")}
    for key, tolerance in ({"train/loss": 1e-4, "train/grad_norm": 1e-3, "eval/loss": 1e-4} | rough).items():
        expected = numbers(folder / alone, key)
        assert len(expected) >= 2
        assert numbers(folder / run, key) == pytest.approx(expected, rel=tolerance), key


def test_what_two_ranks_saved_loads_on_one(runs: tuple[Path, list[str]], recipe: Path, tmp_path: Path) -> None:
    folder, _ = runs
    shutil.copytree(folder / "rows", tmp_path / "copy")
    run = prepare(recipe, tmp_path / "copy", *SETTINGS)
    saved = checkpoint_state(folder / "rows")
    assert_same(run.tensors(), {name: saved[name] for name in run.tensors()})
    loaded = memshard.load(folder / "columns")
    assert generate(loaded.model, torch.tensor([[1, 2, 3]]), 4).shape == (1, 4)


def test_a_copy_that_drifts_is_named(runs: tuple[Path, list[str]]) -> None:
    _, said = runs
    assert all("blocks.0.mixer_residual.norm.weight on rank 1" in message for message in said), said


def test_every_way_to_lay_out_starts_from_the_same_weights(runs: tuple[Path, list[str]], recipe: Path) -> None:
    """Weights are drawn as if there was one rank."""
    folder, _ = runs
    first = [numbers(folder / run, "train/loss")[1] for run in ("alone", "rows")]
    assert first[1] == pytest.approx(first[0], rel=1e-6)


def _refusals(rank: int, world: int, recipe: Path, folder: Path) -> list[str]:
    said = []
    for settings in (["model.mixer.heads=1"], ["model.memory.layers=[1]", "model.feedforward.hidden=31"], ["parallel.memory=1"]):
        try:
            prepare(recipe, folder / "refused", TWO, *settings)
        except ValueError as error:
            said.append(str(error))
    try:
        prepare(recipe, folder / "refused", "parallel.tensor=3")
    except ValueError as error:
        said.append(str(error))
    return said


def test_what_does_not_divide_is_refused(recipe: Path, tmp_path: Path) -> None:
    for heads, hidden, memory, ranks in run_distributed(_refusals, 2, recipe, tmp_path):
        assert "model.mixer.heads is 1" in heads and "set model.mixer.heads to 2" in heads
        assert "model.feedforward.hidden is 31" in hidden and "30 or 32" in hidden
        assert "parallel.memory is 1 and parallel.tensor 2" in memory
        assert "parallel.tensor is 3, which does not divide the number of ranks, 2" in ranks
    with pytest.raises(ValueError, match="parallel.layout is tensor, which needs parallel.tensor"):
        prepare(recipe, tmp_path, COLUMNS)


def test_without_fairscale_the_extra_is_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fairscale.nn.model_parallel", None)
    monkeypatch.delitem(sys.modules, "memshard.parallel.tensor", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'memshard\[tensor-parallel\]'"):
        import memshard.parallel.tensor  # noqa: F401


def test_plan_shows_the_arrangement(capsys: pytest.CaptureFixture[str]) -> None:
    plan: list[Any] = ["plan", "billion", "--world", "8", "--device", "v100-32g", TWO]
    assert main(plan) == 0
    assert "groups of 2 that share matrices and sequences; groups: 4" in capsys.readouterr().out
