"""A disk that refuses what a run writes costs nothing that was saved, and does not end the run."""

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memshard.io import sync
from memshard.trainer.checkpoint import background
from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.loop import train
from memshard.trainer.watch.heartbeat import read_beats
from memshard.trainer.watch.line_file import LineFile
from memshard.trainer.watch.metrics import METRICS_FILE, read_metrics
from tests.trainer.tiny_run import assert_same, checkpoint_state, numbers, prepare, train_run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk of its own without the right to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(disk: Path) -> Path:
    """Write a file until the disk is full; return it."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return filler


def _until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def _newest(run: Path) -> int:
    return int(committed(run / "checkpoints")[-1].name[5:])


def _step(run: Path) -> int:
    return read_beats(run)[0].step


@pytest.mark.parametrize("freed", [True, False])
def test_a_full_disk_costs_no_checkpoint_and_does_not_end_a_run(
    freed: bool, disk: Path, recipe: Path, tmp_path: Path
) -> None:
    """Freed, it goes on as if nothing had been; full at the end, it fails and says so."""
    run, output = disk / "run", tmp_path / "output"
    command = [sys.executable, "-m", "memshard", "train", str(recipe), "--run", str(run)]
    command += ["train.steps=100000", "train.save_every=20"]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        _until(lambda: (run / "checkpoints/step-00000040").exists(), process)
        filler = _fill(disk)
        _until(lambda: b"could not be written" in output.read_bytes(), process)
        kept = committed(run / "checkpoints")
        _until(lambda: _step(run) >= int(kept[-1].name[5:]) + 100, process)
        assert committed(run / "checkpoints") == kept
        if freed:
            filler.unlink()
            _until(lambda: _newest(run) > int(kept[-1].name[5:]), process)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    text = output.read_text()
    assert "No space left on device: '" in text and "Traceback" not in text, text
    assert not [path for path in (run / "checkpoints").iterdir() if path.suffix == ".partial"]
    (beat,) = read_beats(run)
    if freed:
        assert (process.returncode, beat.ended) == (75, "stopped"), text
        steps = list(numbers(run, "train/loss"))
        assert steps == list(range(1, len(steps) + 1)) and len(steps) == _newest(run)
    else:
        assert (process.returncode, beat.ended) == (1, "failed"), text
        assert "No space left on device" in (beat.error or "")
        assert "memshard: error: OSError: " in text
        assert committed(run / "checkpoints") == kept


class _Lift(logging.Handler):
    """Lifts the limit on files' sizes when a save has failed."""

    def emit(self, record: logging.LogRecord) -> None:
        if "could not be written" in record.getMessage():
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )


def test_a_save_that_failed_is_tried_again_before_the_next(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(background, "RETRY_FACTOR", 0.0)  # under load a save takes long
    run = prepare(recipe, tmp_path / "run", "train.save_every=100", "train.steps=200")
    logging.getLogger("memshard").addHandler(lift := _Lift())
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        logging.getLogger("memshard").removeHandler(lift)
    first, last = committed(tmp_path / "run/checkpoints")
    assert 100 < int(first.name[5:]) < 200 and last.name == "step-00000200"
    train_run(recipe, tmp_path / "whole", "train.steps=200")
    assert_same(checkpoint_state(last), checkpoint_state(tmp_path / "whole"))
    assert list(numbers(tmp_path / "run", "train/loss")) == list(range(1, 201))


def test_a_save_needs_nothing_from_the_data_folder(
    recipe: Path, data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    run = prepare(recipe, tmp_path / "run", f"data.path={copy}", "train.save_every=2")
    (copy / "index.json").unlink()
    (copy / "tokenizer.model").unlink()
    (tmp_path / "run/config.yaml").unlink()
    train(run)
    newest = committed(tmp_path / "run/checkpoints")[-1]
    assert newest.name == "step-00000010"
    tokenizer = (data / "tokenizer.model").read_bytes()
    assert (newest / "tokenizer.model").read_bytes() == tokenizer


def test_a_tokenizer_that_changed_is_found_at_the_start(
    recipe: Path, data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    with (copy / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="is not the tokenizer that the data set was built with"):
        prepare(recipe, tmp_path / "run", f"data.path={copy}")
    assert not (tmp_path / "run").exists()


def test_lines_of_a_file_that_is_removed_are_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / METRICS_FILE
    lines = LineFile(path)
    lines.write("one")
    path.unlink()
    lines.write("two")
    assert path.read_text() == "one\ntwo\n"
    path.rename(tmp_path / "moved")
    lines.write("three")
    lines.close()
    assert path.read_text() == "one\ntwo\nthree\n"
    assert caplog.text.count("was removed or replaced: it is made anew") == 2


def test_lines_go_on_behind_a_file_that_is_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a line that is left would make the next one unreadable."""
    path = tmp_path / METRICS_FILE
    lines = LineFile(path)
    lines.write('{"step": 1}')
    os.truncate(path, 5)
    lines.write('{"step": 2}')
    lines.write('{"step": 3}')
    lines.close()
    assert read_metrics(path) == [{"step": 2}, {"step": 3}]
    assert caplog.text.count("was cut by something else: lines of it are lost") == 1


def test_a_folder_that_takes_no_tensorboard_files_ends_no_run(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = prepare(recipe, tmp_path / "run", "train.steps=4")
    (tmp_path / "run/tensorboard").write_text("a file of the user's")
    train(run)
    assert list(numbers(tmp_path / "run", "train/loss")) == [1, 2, 3, 4]
    assert caplog.text.count("run/tensorboard cannot be written") == 1


def test_a_file_system_that_cannot_sync_still_gets_files() -> None:
    """A pipe refuses with EINVAL, as some network file systems do."""
    reader, writer = os.pipe()
    sync(writer)
    os.close(writer)
    os.close(reader)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sync(writer)
