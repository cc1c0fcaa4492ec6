"""Worker processes that read ahead end with the run, also after an error."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from memshard.data_pipeline.stream.prefetch import Prefetched


class _Damaged:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


def test_workers_end_while_a_traceback_holds_their_iterator() -> None:
    """They hear no SIGTERM, so Python would wait for them for ever when it ends."""
    stream: Any = _Damaged(RuntimeError("the data are damaged"))
    before = set(multiprocessing.active_children())
    steps = Prefetched(stream, 0, 4, 1, 0, 1, None, workers=2)
    with pytest.raises(RuntimeError, match="damaged") as held:
        next(steps)
    iterator = steps._steps
    steps.close()
    assert held.tb is not None and iterator is not None
    assert set(multiprocessing.active_children()) == before


class _Unsendable(ValueError):
    def __reduce__(self) -> Any:
        raise TypeError("not sent")


def test_an_error_of_a_worker_arrives_as_it_is() -> None:
    """Its type decides the exit code, and its message is for people."""
    stream: Any = _Damaged(FileNotFoundError(2, "No such file or directory", "data/train.tar"))
    steps = Prefetched(stream, 0, 4, 1, 0, 1, None, workers=1)
    with pytest.raises(FileNotFoundError) as caught:
        next(steps)
    steps.close()
    assert str(caught.value) == "[Errno 2] No such file or directory: 'data/train.tar'"
    stream = _Damaged(_Unsendable("odd"))
    steps = Prefetched(stream, 0, 4, 1, 0, 1, None, workers=1)
    with pytest.raises(TypeError, match="odd"):
        next(steps)
    steps.close()


class _Deadly:
    """Kills the process that reads a step, as often as there are words in a file."""

    def __init__(self, step: int, words: Path) -> None:
        self._step, self._words = step, words

    def batch(self, first: int, count: int) -> int:
        words = self._words.read_text().split()
        if first == self._step and words:
            self._words.write_text(" ".join(words[1:]))
            os.kill(os.getpid(), signal.SIGKILL)
        return first


@pytest.mark.parametrize("times", [1, 2])
def test_a_reader_that_is_killed_is_replaced_once(
    times: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = tmp_path / "words"
    words.write_text("again " * times)
    # A kill may take with it steps before its own that were not sent yet, which are read again:
    # the second kill comes at the same step for certain only where there is none before it.
    stream: Any = _Deadly(3 if times == 1 else 0, words)
    steps: Any = Prefetched(stream, 0, 6, 1, 0, 1, None, workers=1)
    if times == 1:
        assert list(steps) == [[step] for step in range(6)]
    else:
        with pytest.raises(RuntimeError, match="killed again and again \\(exit code -9\\)"):
            next(steps)
    steps.close()
    assert caplog.text.count("a process that reads data was killed (-9): started again") == 1
