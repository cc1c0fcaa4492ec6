"""How often a step waits for the device, by torch's own account.

`torch.cuda.set_sync_debug_mode` warns where the host waits for a value or for a copy; it does not
see waits for streams and events.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memshard.bench.gpu.bench import Bench, Result, tried_each
from memshard.bench.gpu.configurations import CONFIGURATIONS
from memshard.bench.gpu.stages.twins import tiny_recipe
from memshard.trainer.config.load import load_recipe
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step

MOST = 2
"""Waits that a step may have: its verdict, and metrics where they are logged."""
_MAY_WAIT = ("host", "revive", "adaptive")
"""Parts of names of configurations that wait by what they are: rows in host memory travel, a
revival picks its rows, torch's adaptive softmax picks the tokens of each cluster.
"""
_PACKAGE = str(Path(__file__).parents[3])


def run(bench: Bench) -> Iterator[tuple[str, Result]]:
    """Yield the number of waits of a third step of every configuration, and where they are."""
    recipe = tiny_recipe(bench)
    yield from tried_each(bench, CONFIGURATIONS, partial(_waits, bench, recipe))


def _waits(bench: Bench, recipe: Path, name: str) -> Result:
    settings = load_recipe(recipe, CONFIGURATIONS[name])
    run = set_up(settings, bench.scratch / f"{name}, waits", bench.device)
    for _ in range(2):
        train_step(run)
    with counted() as places:
        train_step(run)
    free = any(part in name for part in _MAY_WAIT)
    waits = places.total()
    return {"waits": waits, "places": dict(places), "ok": free or waits <= MOST}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count, by line of memshard, what torch says in the block to be a wait for the device."""
    places: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            places[_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # Called where the wait is, with its stack: a recorded warning has only torch's line.
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _line() -> str:
    """Return the innermost line of memshard, outside this file."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE) and path != __file__:
            return f"{path.removeprefix(_PACKAGE)[1:]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch's backward"
