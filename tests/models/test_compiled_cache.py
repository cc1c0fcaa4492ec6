"""The cache of compiled kernels loads what this user compiled, whole, and nothing else."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memshard.models.kernels.compile_cpp import load_library

LOAD = (
    "import sys; from pathlib import Path; from memshard.models.kernels.compile_cpp import "
    "load_library; print(load_library(Path(sys.argv[1])).answer())"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.cpp"
    file.write_text('extern "C" int answer() { return 42; }\n')
    before = os.umask(0o022)
    yield file
    os.umask(before)


def _built(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache/memshard/kernels").glob("*.so")
    return file


def _answer(source: Path) -> str:
    """Of a process of its own: this one has the first file mapped."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(source)], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_only_the_user_can_write_to_it_whatever_the_umask(
    mask: int, source: Path, tmp_path: Path
) -> None:
    os.umask(mask)
    assert load_library(source).answer() == 42
    os.umask(0o022)
    folder = _built(tmp_path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in (*folder.iterdir(), folder.parent, folder.parent.parent):
        assert not path.stat().st_mode & 0o077, path


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_compiled_again(damage: str, source: Path, tmp_path: Path) -> None:
    assert _answer(source) == "42"
    file = _built(tmp_path)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 4
    file.write_bytes(
        {"cut": whole[: len(whole) // 2], "flip": bytes(flipped), "empty": b""}[damage]
    )
    assert _answer(source) == "42"
    assert _built(tmp_path).read_bytes() == whole


def test_what_others_could_have_written_is_compiled_again(source: Path, tmp_path: Path) -> None:
    assert _answer(source) == "42"
    file, theirs = _built(tmp_path), tmp_path / "theirs.cpp"
    theirs.write_text('extern "C" int answer() { return 666; }\n')
    assert _answer(theirs) == "666"
    # Under the right name, as whoever can write there can also hash.
    planted = next(path for path in file.parent.glob("theirs-*.so"))
    key = file.stem.rpartition("-")[0]
    planted.rename(file.with_name(f"{key}-{planted.stem.rpartition('-')[2]}.so"))
    file.unlink()
    assert _answer(source) == "666"  # where only the user can write, it is the user's
    file.parent.chmod(0o777)
    assert _answer(source) == "42"


def test_a_folder_that_is_not_the_users_own_is_refused(source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = tmp_path / "cache/memshard/kernels"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(elsewhere)
    with pytest.raises(OSError, match="is a link or another user's"):
        load_library(source)
    folder.unlink()
    if os.geteuid() == 0:
        folder.mkdir(0o700)
        os.chown(folder, 65534, 65534)
        with pytest.raises(OSError, match="is a link or another user's"):
            load_library(source)
    assert list(elsewhere.iterdir()) == []


def test_a_folder_above_that_others_could_swap_is_refused(source: Path, tmp_path: Path) -> None:
    """A cache in /tmp, where somebody else made the folder `memshard` first."""
    assert load_library(source).answer() == 42
    above = tmp_path / "cache/memshard"
    above.chmod(0o777)
    with pytest.raises(OSError, match="memshard is another user's, or everybody can write to it"):
        load_library(source)
    above.chmod(0o1777)
    assert load_library(source).answer() == 42
    if os.geteuid() == 0:
        os.chown(above, 65534, 65534)
        with pytest.raises(OSError, match="memshard is another user's"):
            load_library(source)


def test_of_16_processes_one_compiles(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo x >> {log}; sleep 0.5;; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    processes = [
        subprocess.Popen([sys.executable, "-c", LOAD, str(source)], stdout=subprocess.PIPE)
        for _ in range(16)
    ]
    assert [process.communicate()[0] for process in processes] == [b"42\n"] * 16
    assert log.read_text() == "x\n"
