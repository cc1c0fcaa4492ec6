"""What a checkpoint holds is what was trained, or the loader says so and takes the one before."""

import functools
import json
import logging
import pickle
import re
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.launch.cli.main import main
from memshard.trainer.checkpoint import open_checkpoint
from memshard.trainer.checkpoint.background import BackgroundSave
from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.checkpoint.save_load import (
    DamagedCheckpoint,
    load_state,
    load_state_together,
    load_tensors,
    save_checkpoint,
)
from memshard.trainer.resume import save
from tests.distributed import run_distributed
from tests.trainer.tiny_run import assert_same, bound_by_modes, checkpoint_state, prepare, train_run

FILES = ["state.json", "rank0.bin", "index.json", "config.yaml", "tokenizer.model"]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[min(40, len(data) // 2)] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def saved_twice(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    train_run(recipe, folder, "train.steps=4", "train.save_every=2")
    return folder


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(
    name: str,
    damage: Callable[[Path], None],
    saved_twice: Path,
    recipe: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Path(shutil.copytree(saved_twice, tmp_path / "run"))
    newest = run / "checkpoints/step-00000004"
    damage(newest / name)
    with pytest.raises(
        DamagedCheckpoint, match=f"step-00000004 is damaged .*{name.partition('.')[0]}"
    ):
        load_model(newest)
    assert load_model(run).step == 2
    assert re.search("step-00000004 is damaged.*the checkpoint before it is read", caplog.text)
    with caplog.at_level(logging.WARNING):
        resumed = prepare(recipe, run)
    assert resumed.progress.step == 2 and "the run goes on from step 2" in caplog.text
    assert [path.name for path in (run / "checkpoints").iterdir() if "damaged" in path.name] == [
        "damaged-step-00000004"
    ]


def test_a_checkpoint_that_its_run_removes_under_a_reader_is_not_called_damaged(
    saved_twice: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The next one is read, as whoever evaluates a run that trains expects."""
    old, new = (tmp_path / "run/checkpoints" / f"step-0000000{step}" for step in (2, 4))
    shutil.copytree(saved_twice, tmp_path / "run")
    new.rename(tmp_path / "later")
    read = open_checkpoint.index_of

    def save_and_prune(folder: Path) -> object:
        if folder == old:
            (tmp_path / "later").rename(new)
            shutil.rmtree(old)
        return read(folder)

    monkeypatch.setattr(open_checkpoint, "index_of", save_and_prune)
    assert load_model(tmp_path / "run").step == 4
    assert "damaged" not in caplog.text
    new.rename(tmp_path / "later")
    shutil.copytree(saved_twice / "checkpoints" / old.name, old)
    with pytest.raises(ValueError, match="step-00000002 does not exist: give a run folder"):
        load_model(old)


def test_the_damage_is_named_where_the_checkpoint_before_it_is_removed(
    saved_twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (tmp_path / "run/checkpoints" / f"step-0000000{step}" for step in (2, 4))
    shutil.copytree(saved_twice, tmp_path / "run")
    _truncate(new / "rank0.bin")
    read = open_checkpoint.index_of

    def prune(folder: Path) -> object:
        shutil.rmtree(old)
        return read(folder)

    monkeypatch.setattr(open_checkpoint, "index_of", prune)
    with pytest.raises(DamagedCheckpoint, match="step-00000004"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize("name", [*FILES, "COMMITTED", ".", ".."])
def test_a_checkpoint_that_cannot_be_read_ends_the_command_and_stays(
    name: str, saved_twice: Path
) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        run = Path(shutil.copytree(saved_twice, Path(folder) / "run"))
        newest = run / "checkpoints/step-00000004"
        load_model(run)  # imports what another user may not read
        closed = newest if name == "." else newest.parent if name == ".." else newest / name
        closed.chmod(0)
        with bound_by_modes():
            for read in (load_model, functools.partial(load_model, memmap=True), _restore):
                with pytest.raises(PermissionError, match=str(closed)):
                    read(run)
        closed.chmod(0o755)
        assert [path.name for path in committed(newest.parent)] == [
            "step-00000002",
            "step-00000004",
        ]


def _restore(run: Path) -> None:
    """Read a run's newest checkpoint as a resume does."""
    newest = committed(run / "checkpoints")[-1]
    load_state_together(newest)
    load_tensors(newest, {"model.norm.weight": torch.empty(16)})


def test_a_disk_error_is_no_damage(saved_twice: Path, recipe: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(saved_twice, tmp_path / "run"))
    state = run / "checkpoints/step-00000004/state.json"
    state.unlink()
    state.symlink_to("/proc/self/mem")  # a read at 0 is an input/output error
    with pytest.raises(OSError, match=f"Input/output error: '{state}'"):
        prepare(recipe, run)
    assert len(committed(run / "checkpoints")) == 2


def test_a_run_that_fell_back_ends_like_one_that_did_not(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=6", "train.save_every=3")
    _flip(tmp_path / "run/checkpoints/step-00000006/rank0.bin")
    train_run(recipe, tmp_path / "run")
    train_run(recipe, tmp_path / "whole")
    assert_same(checkpoint_state(tmp_path / "run"), checkpoint_state(tmp_path / "whole"))


def test_where_all_are_damaged_the_newest_is_named(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=4", "train.save_every=2")
    for folder in committed(tmp_path / "run/checkpoints"):
        _flip(folder / "state.json")
    assert main(["train", str(recipe), "--run", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert (
        "step-00000004 is damaged (state.json does not match its hash)" in error
        and "delete that folder" in error
    )
    assert len(committed(tmp_path / "run/checkpoints")) == 2


def test_a_save_beside_training_hides_no_warnings_of_it(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="of a step"):
        save_checkpoint(
            tmp_path / "step-00000001",
            {"x": torch.ones(2)},
            {},
            {},
            free=lambda: warnings.warn("of a step", stacklevel=1),
        )


class _Code:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    """A checkpoint of torch's own storage keeps its index as a pickle."""
    folder, mark = tmp_path / "step-00000001", tmp_path / "has run"
    save_checkpoint(folder, {"x": torch.ones(2)}, {}, {})
    (folder / "index.json").unlink()
    for name in (".metadata", "__0_0.distcp", "index.json", "state.json", "rank0.bin"):
        (folder / name).write_bytes(pickle.dumps(_Code(mark)))
        with pytest.raises(DamagedCheckpoint):
            load_tensors(folder, {"x": torch.empty(2)})
    with pytest.raises(DamagedCheckpoint):
        load_state(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "object"}, "entry of x is malformed"),
        ({"shape": [1 << 61, 1 << 61]}, "is no shape"),
        ({"shape": [-4, -3]}, "are not sizes"),
        ({"shape": [5, 3]}, "do not cover its shape"),
        ({"file": "../rank0.bin"}, "which is no data file"),
        ({"file": "/etc/passwd"}, "which is no data file"),
        ({"file": "rank1.bin"}, "ends at byte 48 of rank1.bin, which has 0"),
        ({"at": 1 << 50}, "ends at byte .* of rank0.bin, which has"),
        ({"sizes": [1 << 40, 3]}, "ends at byte"),
        ({"offsets": [1, 0]}, "is not inside its shape"),
        ({"offsets": [0]}, "is not inside its shape"),
        ({"sha256": []}, "0 hashes for 1 pieces"),
        ({"sha256": ["0" * 64]}, "do not match their hash"),
        ({"sizes": "many"}, "malformed"),
    ],
)
def test_an_index_is_not_believed(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    save_checkpoint(folder, {"x": torch.rand(4, 3)}, {}, {})
    index = json.loads((folder / "index.json").read_text())
    (key,) = change
    entry = index["tensors"]["x"]
    (entry if key in entry else entry["chunks"][0]).update(change)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedCheckpoint, match=message):
        load_tensors(folder, {"x": torch.empty(4, 3)})


def _tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "table": (9000, 1000),
        "dense": (3000, 1000),
        "scalar": (),
        "empty": (0, 7),
        "odd": (3, 5, 7),
    }
    tensors = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    return tensors | {"half": tensors["odd"].bfloat16(), "flags": tensors["odd"] > 0.5}


def test_an_update_during_a_save_does_not_reach_it(tmp_path: Path) -> None:
    """A table of three pieces is written where it lies, the others are copied; the save is
    of one step.
    """
    saving, live, state = BackgroundSave(), _tensors(0), {"losses": [1.0]}
    saving.start(tmp_path / "step-00000001", live, state, {}, ["table"], lambda: None)
    for tensor in live.values():
        tensor.zero_()
    state["losses"].append(2.0)
    assert not (tmp_path / "step-00000001").exists(), "the save was over before the update"
    saving.wait()
    loaded = {name: torch.empty_like(tensor) for name, tensor in live.items()}
    load_tensors(tmp_path / "step-00000001", loaded)
    assert_same(loaded, _tensors(0))
    assert load_state(tmp_path / "step-00000001") == {"losses": [1.0]}


def test_old_checkpoints_go_and_those_of_round_steps_stay(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", "train.save_every=1", "train.keep_every=4")
    assert [path.name for path in committed(tmp_path / "run/checkpoints")] == [
        f"step-{step:08d}" for step in (4, 8, 9, 10)
    ]


def _fill_the_disk_of_the_second_rank(rank: int, world: int, recipe: Path, folder: Path) -> str:
    run = prepare(recipe, folder, "train.steps=2")
    save(run)
    run.progress.step = 1
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        save(run, wait=False)
        run.saving.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = prepare(recipe, folder)
    return f"{run.saving.failed}, at step {again.progress.step}"


def test_a_full_disk_on_one_rank_costs_no_checkpoint(recipe: Path, tmp_path: Path) -> None:
    problems = run_distributed(_fill_the_disk_of_the_second_rank, 2, recipe, tmp_path / "run")
    for problem in problems:
        assert (
            "step-00000001 could not be written" in problem
            and "File too large" in problem
            and "rank1.bin'), at step 0" in problem
        )
    # Nothing of the save that failed is left on the full disk.
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000000"]


def test_a_copied_checkpoint_stands_alone(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=1")
    shutil.copytree(tmp_path / "run/checkpoints/step-00000001", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    assert load_model(tmp_path / "copy").step == 1
