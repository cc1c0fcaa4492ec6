"""One process at a time writes to a folder, wherever the others run and however they end."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from memshard import lock
from memshard.lock import LOCK_FILE, FolderHeld, Owner, holding

HOLD = """
import sys, time
from pathlib import Path
from memshard.lock import holding
with holding(Path(sys.argv[1]), "go away"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    """Another process that holds `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process  # type: ignore[misc]
        process.kill()


def _owner(folder: Path) -> Owner:
    return Owner(**json.loads((folder / LOCK_FILE).read_text()))


def _write_owner(folder: Path, owner: Owner) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(owner)))


def test_a_second_process_is_told_who_holds_the_folder(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    name = rf"run is in use by process {holder.pid} on \S+, since .*: wait until it ends, or go aw"
    with pytest.raises(FolderHeld, match=name), holding(tmp_path / "run", "go away"):
        pass
    assert _owner(tmp_path / "run").pid == holder.pid


def test_the_folder_of_a_killed_process_is_taken_over_at_once(
    holder: "subprocess.Popen[str]", tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder.kill()  # not waited for: a zombie holds nothing either
    deadline = time.monotonic() + 10
    while lock._start_time(holder.pid) not in (-1, None):
        assert time.monotonic() < deadline
    with holding(tmp_path / "run", "go away"):
        assert _owner(tmp_path / "run").pid == os.getpid()
    assert f"was in use by process {holder.pid}" in caplog.text
    assert "which is gone: taken over" in caplog.text
    assert list((tmp_path / "run").iterdir()) == []


def test_a_number_that_another_process_has_now_is_no_owner(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    owner = _owner(tmp_path / "run")
    assert owner.started is not None
    _write_owner(tmp_path / "run", replace(owner, started=owner.started - 1))
    with holding(tmp_path / "run", "go away"):
        pass


def test_an_owner_on_another_host_is_waited_for_until_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.4)
    away = replace(lock._this_process(), host="n17", machine="another")
    _write_owner(tmp_path / "run", away)
    renewed = threading.Timer(0.5, lambda: os.utime(tmp_path / "run" / LOCK_FILE))
    renewed.start()
    with pytest.raises(FolderHeld, match="on n17"), holding(tmp_path / "run", "go away"):
        pass
    begun = time.monotonic()
    with holding(tmp_path / "run", "go away"):
        assert 1 < time.monotonic() - begun < 4
    assert "on n17" in caplog.text and "waiting up to 2 s for a sign of life" in caplog.text
    # Older than that by the file server's clock: a wait of two renewals.
    _write_owner(tmp_path / "run", away)
    os.utime(tmp_path / "run" / LOCK_FILE, (time.time() - 3, time.time() - 3))
    begun = time.monotonic()
    with holding(tmp_path / "run", "go away"):
        assert 0.7 < time.monotonic() - begun < 1.8


def test_an_owner_is_not_taken_for_dead_because_a_clock_jumped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.4)
    path = tmp_path / LOCK_FILE
    _write_owner(tmp_path, replace(lock._this_process(), host="n17", machine="another"))
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    renewed = threading.Timer(0.3, lambda: os.utime(path, (time.time() - 3599,) * 2))
    renewed.start()
    with pytest.raises(FolderHeld, match="on n17"), holding(tmp_path, "go away"):
        pass


def test_a_file_that_a_kill_left_empty_holds_nothing_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.1)
    (tmp_path / LOCK_FILE).touch()
    with holding(tmp_path, "go away"):
        pass


def test_an_owner_that_was_taken_for_dead_ends_and_removes_nothing(tmp_path: Path) -> None:
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        with holding(tmp_path, "go away") as held:
            other = replace(_owner(tmp_path), token="another")
            (tmp_path / LOCK_FILE).unlink()
            assert held.holds()
            _write_owner(tmp_path, other)
            assert not held.holds() and told.wait(10)
        assert _owner(tmp_path) == other
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("damage", ["removed", "cut", "junk", "link", "large"])
def test_a_lock_that_is_removed_or_damaged_is_made_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner goes on; a second process would otherwise start beside it."""
    path = tmp_path / LOCK_FILE
    with holding(tmp_path, "go away") as held:
        owner = _owner(tmp_path)
        if damage in ("removed", "link"):
            path.unlink()
        if damage == "link":
            path.symlink_to("/dev/zero")
        if damage in ("cut", "large"):
            os.truncate(path, 20 if damage == "cut" else 1 << 21)
        if damage == "junk":
            path.write_text('{"host": 3}')
        assert held.holds(), "at first it may be of a process that is about to write its name"
        monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.0)
        assert held.holds()
        assert _owner(tmp_path) == owner
        with pytest.raises(FolderHeld), holding(tmp_path, "go away"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_removed_with_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.001)
    folder = tmp_path / "work"
    with holding(folder, "go away") as held:
        for number in range(300):
            (folder / f"{number}").touch()
        held.remove_folder()
        assert held.holds() and list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    with holding(folder, "go away") as held:
        folder.rename(tmp_path / "gone")
        held.remove_folder()
    assert "work is not needed any more and could not be removed" in caplog.text


def test_a_folder_that_stays_empty_is_removed_and_others_are_not(tmp_path: Path) -> None:
    with holding(tmp_path / "a" / "b", "go away"):
        pass
    assert not (tmp_path / "a" / "b").exists()
    with holding(tmp_path, "go away"):
        pass
    assert tmp_path.exists()


def _count(folder: Path, number: int) -> None:
    for _ in range(10):
        with holding(folder, "go away", wait=True):
            value = int((folder / "count").read_text())
            time.sleep(0.002)
            (folder / "count").write_text(str(value + 1))


def test_of_many_that_wait_one_at_a_time_gets_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "count").write_text("0")
    # Left by a process that is gone, which all of them see at once.
    _write_owner(tmp_path, replace(lock._this_process(), started=1))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(tmp_path, n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "30"
