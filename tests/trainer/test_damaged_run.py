"""A run whose files are removed or cut, or whose disk is away for a while, loses nothing."""

import logging
import os
import shutil
import time
from pathlib import Path

import pytest

from memshard.data_pipeline.stream import reader
from memshard.data_pipeline.stream.reader import DamagedData
from memshard.launch.cli.main import main
from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.loop import train
from memshard.trainer.run import Run
from memshard.trainer.run_folder import CONFIG_FILE
from memshard.trainer.watch.heartbeat import Heartbeat, read_beats
from memshard.trainer.watch.rank_log import rank_log
from tests.trainer.tiny_run import assert_same, checkpoint_state, prepare, train_run


@pytest.mark.parametrize("left", [None, 0, 30])
def test_a_run_is_resumed_without_its_recipe(
    left: int | None, recipe: Path, tmp_path: Path
) -> None:
    """Its newest checkpoint has it, with a hash; the rest of a file would be another run."""
    run = tmp_path / "run"
    train_run(recipe, run, stop_at=4)
    if left is None:
        (run / CONFIG_FILE).unlink()
    else:
        os.truncate(run / CONFIG_FILE, left)
    with pytest.raises(ValueError, match="holds another run \\(model.layers: 2 there, 3 here"):
        prepare(recipe, run, "model.layers=3")
    train_run(recipe, run)
    train_run(recipe, tmp_path / "whole")
    assert (run / CONFIG_FILE).read_bytes() == (tmp_path / "whole" / CONFIG_FILE).read_bytes()
    assert_same(checkpoint_state(run), checkpoint_state(tmp_path / "whole"))


def test_log_and_heartbeat_are_made_anew(tmp_path: Path) -> None:
    log = logging.getLogger("memshard.test")
    heartbeat = Heartbeat(tmp_path / "run", 0, 1, lambda: (3, "saving"))
    with rank_log(tmp_path / "run", 0, lambda: 0) as path, heartbeat:
        log.info("one")
        shutil.rmtree(tmp_path / "run")
        log.info("two")
    assert path.read_text().endswith("two\n") and "one" not in path.read_text()
    (beat,) = read_beats(tmp_path / "run")
    assert beat.ended == "saving"


def _refuse(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Let that many reads of data fail as on a disk that is away; return where all reads began."""
    read, asked = os.pread, []

    def refuse(descriptor: int, size: int, begin: int) -> bytes:
        asked.append(begin)
        if len(asked) <= times:
            raise OSError(116, "Stale file handle")
        return read(descriptor, size, begin)

    monkeypatch.setattr(os, "pread", refuse)
    monkeypatch.setattr(reader, "PAUSES", (0.0, 0.0))
    return asked


def test_a_disk_that_is_away_for_a_while_damages_no_document(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train_run(recipe, tmp_path / "whole")
    run = prepare(recipe, tmp_path / "run")
    _refuse(monkeypatch, 2)
    train(run)
    assert_same(checkpoint_state(tmp_path / "run"), checkpoint_state(tmp_path / "whole"))
    assert caplog.text.count("Stale file handle; it is tried again") == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_stays_away_stops_a_run_that_resumes_as_if_nothing_had_happened(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    run, words = tmp_path / "run", (f"data.workers={workers}",)
    train_run(recipe, run, *words, stop_at=4)
    with monkeypatch.context() as away:
        _refuse(away, 1000)
        assert main(["train", str(recipe), *words, "--run", str(run)]) == 75
    error = capsys.readouterr().err
    assert "train-00000.tar: Stale file handle, tried 3 times); at step 4 of 10, saved" in error
    assert "is masked" not in error
    train_run(recipe, run, *words)
    train_run(recipe, tmp_path / "whole", *words)
    assert_same(checkpoint_state(run), checkpoint_state(tmp_path / "whole"))


def test_a_data_folder_that_is_gone_stops_a_run_and_one_file_of_it_is_damage(
    recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PAUSES", (0.0, 0.0))
    copy = shutil.copytree(data, tmp_path / "data")
    gone = prepare(recipe, tmp_path / "run", f"data.path={copy}")
    copy.rename(tmp_path / "unmounted")
    assert "train-00000.tar: No such file" in train(gone)["outage"]
    (tmp_path / "unmounted").rename(copy)
    assert train_run(recipe, tmp_path / "run", f"data.path={copy}")["finished"]
    less = prepare(recipe, tmp_path / "less", f"data.path={copy}")
    (copy / "train-00000.tar").unlink()
    with pytest.raises(DamagedData, match="train-00000.tar"):
        train(less)


def test_a_place_that_a_disk_cannot_read_is_damage(
    recipe: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read, shard = os.pread, (data / "train-00000.tar").stat()

    def refuse(descriptor: int, size: int, begin: int) -> bytes:
        here = os.path.samestat(os.fstat(descriptor), shard)
        if here and begin <= 1000 < begin + size:
            raise OSError(5, "Input/output error")
        return read(descriptor, size, begin)

    monkeypatch.setattr(os, "pread", refuse)
    monkeypatch.setattr(reader, "PAUSES", (0.0, 0.0))
    assert train_run(recipe, tmp_path / "run", "data.damage_tolerance=0.9")["finished"]
    assert caplog.text.count("is masked") == 1


def test_a_run_whose_data_are_found_to_be_damaged_saves_before_it_ends(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read = prepare(recipe, tmp_path / "run"), Run.next_batches

    def damage(self: Run) -> object:
        if self.progress.step == 5:
            raise DamagedData("most of it is damaged")
        return read(self)

    monkeypatch.setattr(Run, "next_batches", damage)
    with pytest.raises(DamagedData, match="most of it"):
        train(run)
    assert checkpoint_state(tmp_path / "run")["progress"]["step"] == 5


def test_an_error_does_not_cut_off_the_save_before_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(recipe, tmp_path / "run", "train.save_every=5")
    sync, read = os.fsync, Run.next_batches

    def slow(descriptor: int) -> None:
        time.sleep(0.2)
        sync(descriptor)

    def fail(self: Run) -> object:
        if self.progress.step == 5:
            raise RuntimeError("no data any more")
        return read(self)

    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(Run, "next_batches", fail)
    with pytest.raises(RuntimeError, match="no data any more"):
        train(run)
    assert [path.name for path in committed(tmp_path / "run/checkpoints")] == ["step-00000005"]
