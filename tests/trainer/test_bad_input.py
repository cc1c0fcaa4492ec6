"""Mistakes cost one clear line and exit code 2, and leave nothing behind."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from memshard.launch.cli.main import main
from memshard.trainer.config.load import load_recipe
from memshard.trainer.run_folder import MOST_METRICS, check_identity
from tests.data_pipeline.conftest import build, write_corpus
from tests.trainer.tiny_run import ORDINARY_USER, bound_by_modes, checkpoint_state, train_run


def refused(capfd: pytest.CaptureFixture[str], *argv: object) -> str:
    """Return the one line that a refused command prints."""
    capfd.readouterr()
    assert main([str(argument) for argument in argv]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("memshard: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.memory.tpok=3",
            "unknown key 'model.memory.tpok'; did you mean 'model.memory.topk'?",
        ),
        (
            "model.memory.topk=9",
            "model.memory.topk is 9 but there are only 8 sub-keys per half: set model.memory.topk "
            "to at most 8",
        ),
        (
            "model.memory.layers=[2]",
            "model.memory.layers names layer 2, but the model has 2 layers: use numbers from 0 to "
            "1",
        ),
        (
            "model.memory.keys=200000",
            "GB are available: lower model.memory.keys, or use more ranks",
        ),
        ("model.mixer.heads=0", "model.mixer.heads is 0; it must be at least 1"),
        ("model.feedforward.hidden=-1", "model.feedforward.hidden is -1; it must be at least 1"),
        ("model.vocab_size=299", "has 300 tokens: leave model.vocab_size out, or set at least 300"),
        (
            "model.max_length=31",
            "model.max_length holds 31 positions but data.length is 32: raise it or leave it out",
        ),
        (
            "data.path=nowhere",
            "is not a data folder (no index.json): name another one (data.path, or --data of "
            "eval), or make one with `memshard data build SRC --out nowhere`",
        ),
        ("data.length=0", "data.length is 0; it must be at least 1"),
        ("train.micro_batch=0", "train.micro_batch is 0; it must be at least 1"),
        ("train.eval_every=-1", "train.eval_every is -1; it must be at least 0"),
        (
            "train.seed=99999999999999999999",
            "train.seed is 99999999999999999999; it must be at least 0 and below 2^63",
        ),
        ("optimizer.lr=-1", "optimizer.lr is -1.0; it must be at least 0"),
        ("optimizer.warmup=-1", "optimizer.warmup is -1; it must be at least 0"),
        (
            "tables.betas=[0.9, 1]",
            "tables.betas is [0.9, 1.0]; both must be at least 0 and below 1",
        ),
        ("--stop-at=0", "--stop-at is 0; steps are counted from 1"),
    ],
)
def test_bad_settings(
    override: str, message: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capfd, "train", recipe, "--run", tmp_path / "run", override)
    assert list(tmp_path.iterdir()) == []


def test_a_step_larger_than_the_data(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ("data.order=contiguous", "train.batch=100")
    assert "too few for one step of train.batch 100 x data.length 32" in refused(
        capfd, "train", recipe, "--run", tmp_path / "run", *settings
    )


def test_a_broken_recipe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text("data: {path: x\nmodel: {}\n")
    assert "broken.yaml, line 2: not valid YAML" in refused(
        capfd, "train", recipe, "--run", tmp_path / "run"
    )
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize(
    ("file", "left", "message"),
    [
        (
            "train-00000.tar",
            None,
            "train-00000.tar is missing: copy it back, or build the data set again",
        ),
        ("train-00000.tar", 1000, "train-00000.tar has 1,000 bytes but index.json says"),
        ("heldout-00000.index.npy", None, "heldout-00000.index.npy is missing"),
        ("heldout-00000.index.npy", 20, "heldout-00000.index.npy is damaged"),
        ("index.json", 300, "index.json is damaged"),
        ("tokenizer.model", None, "tokenizer.model is missing"),
    ],
)
def test_damaged_data(
    file: str,
    left: int | None,
    message: str,
    data: Path,
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """left: bytes that are left of the file, or None if it is gone."""
    shutil.copytree(data, tmp_path / "data")
    if left is None:
        (tmp_path / "data" / file).unlink()
    else:
        os.truncate(tmp_path / "data" / file, left)
    assert message in refused(
        capfd, "train", recipe, "--run", tmp_path / "run", f"data.path={tmp_path / 'data'}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_run_folder_of_another_run(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train_run(recipe, folder, "train.steps=2")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    error = refused(
        capfd, "train", recipe, "--run", folder, "model.layers=3", "tables.lr=0.5", "train.steps=4"
    )
    assert (
        f"{folder} holds another run (model.layers: 2 there, 3 here; tables.lr: 0.001 there, 0.5 "
        f"here): choose the same settings, or another folder with --run, where init_from={folder} "
        "begins" in error
    )
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_that_changed_under_a_run(
    data: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Data that moved is the same data; other text under the old name is not."""
    moved = tmp_path / "data"
    shutil.copytree(data, moved)
    train_run(recipe, tmp_path / "run", "train.steps=2")
    train_run(recipe, tmp_path / "run", "train.steps=3", f"data.path={moved}")
    before = (tmp_path / "run/config.yaml").read_bytes()
    shutil.rmtree(moved)
    write_corpus(tmp_path / "text", documents=9, seed=2)
    build(tmp_path / "text", moved, vocab_size=300, held_out=0.3)
    error = refused(
        capfd, "train", recipe, "--run", tmp_path / "run", "train.steps=4", f"data.path={moved}"
    )
    assert (
        f"{moved} is not the data that" in error
        and "give the original folder as data.path, or another --run folder" in error
    )
    assert (tmp_path / "run/config.yaml").read_bytes() == before and checkpoint_state(
        tmp_path / "run"
    )["progress"]["step"] == 3


def test_nothing_to_evaluate(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist: give a run folder (such as runs/quickstart)" in refused(
        capfd, "eval", tmp_path / "gone"
    )
    (tmp_path / "empty").mkdir()
    assert "holds no committed checkpoint: give a run folder" in refused(
        capfd, "eval", tmp_path / "empty"
    )
    train_run(recipe, tmp_path / "run", "train.steps=1")
    (tmp_path / "run/checkpoints/step-00000001/COMMITTED").unlink()
    assert "holds no committed checkpoint" in refused(capfd, "eval", tmp_path / "run")


def test_evaluation_on_unfit_data(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=1")
    write_corpus(tmp_path / "text", documents=9, seed=5)
    build(tmp_path / "text", tmp_path / "other", vocab_size=300, held_out=0.3)
    error = refused(capfd, "eval", tmp_path / "run", "--data", tmp_path / "other")
    assert f"{tmp_path / 'other'} was built with another tokenizer than {tmp_path / 'run'}" in error
    assert "is not a data folder" in refused(
        capfd, "eval", tmp_path / "run", "--data", tmp_path / "text"
    )
    assert "--batch is 0" in refused(capfd, "eval", tmp_path / "run", "--batch", 0)


@pytest.mark.parametrize(
    ("name", "mode", "said"),
    [
        ("heartbeat", 0o500, "cannot be written"),
        ("checkpoints", 0o500, "cannot be written"),
        ("log", 0o500, "cannot be written"),
        ("log/rank0.log", 0o400, "cannot be written"),
        ("metrics.jsonl", 0o200, "cannot be read"),
    ],
)
def test_what_a_run_could_not_use_is_named_at_its_start(
    name: str, mode: int, said: str, recipe: Path
) -> None:
    with TemporaryDirectory() as root:
        folder = Path(root) / "run"
        train_run(recipe, folder, "train.steps=1")
        (folder / "log").mkdir()
        (folder / "heartbeat").mkdir()
        (folder / "log/rank0.log").touch()
        for path in (Path(root), folder, *folder.rglob("*")):
            if os.geteuid() == 0:
                os.chown(path, ORDINARY_USER, ORDINARY_USER)
        stored = load_recipe(str(folder / "config.yaml"))
        with bound_by_modes():
            check_identity(folder, stored)
            (folder / name).chmod(mode)
            with pytest.raises(ValueError, match=f"{folder / name} {said}: mend its permissions"):
                check_identity(folder, stored)


def test_metrics_larger_than_memory_are_named_at_the_start(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=1")
    os.truncate(tmp_path / "run/metrics.jsonl", MOST_METRICS + 1)  # takes no room on the disk
    message = refused(capfd, "train", recipe, "--run", tmp_path / "run")
    assert "run/metrics.jsonl has 17,179,869,185 bytes: move it away" in message
