"""Worker processes that read ahead end with the run, also after an error."""

import multiprocessing
from typing import Any

import pytest

from memshard.data_pipeline.stream.prefetch import Prefetched


class _Damaged:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("the data are damaged")


def test_workers_end_while_a_traceback_holds_their_iterator() -> None:
    """They hear no SIGTERM, so Python would wait for them for ever when it ends."""
    stream: Any = _Damaged.__new__(_Damaged)
    before = set(multiprocessing.active_children())
    steps = Prefetched(stream, 0, 4, 1, 0, 1, None, workers=2)
    with pytest.raises(RuntimeError, match="damaged") as held:
        next(steps)
    iterator = steps._steps
    steps.close()
    assert held.tb is not None and iterator is not None
    assert set(multiprocessing.active_children()) == before
