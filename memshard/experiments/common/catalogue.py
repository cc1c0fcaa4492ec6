"""The experiments that `memshard reproduce` knows. Importing this file does not load torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, get_args

Scale = Literal["smoke", "small", "full"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Point = dict[str, Any]
"""Settings of one run, as plain JSON values."""

_PATHS = {
    "data/order": "memshard.experiments.data.order",
    "fast_weights/capacity": "memshard.experiments.fast_weights.capacity",
    "fast_weights/language": "memshard.experiments.fast_weights.language",
    "fast_weights/translation": "memshard.experiments.fast_weights.translation",
    "fast_weights/update": "memshard.experiments.fast_weights.update",
    "lookup/alternatives": "memshard.experiments.lookup.alternatives",
    "pkm/headline": "memshard.experiments.pkm.studies:HEADLINE",
    "pkm/shuffled": "memshard.experiments.pkm.studies:SHUFFLED",
    "pkm/depth": "memshard.experiments.pkm.studies:DEPTH",
    "pkm/position": "memshard.experiments.pkm.studies:POSITION",
    "pkm/heads": "memshard.experiments.pkm.studies:HEADS",
    "pkm/keys": "memshard.experiments.pkm.studies:KEYS",
    "pkm/flat": "memshard.experiments.pkm.studies:FLAT",
    "pkm/gates": "memshard.experiments.pkm.studies:GATES",
    "pkm/alternatives": "memshard.experiments.pkm.studies:ALTERNATIVES",
    "primer/parts": "memshard.experiments.primer.parts",
    "reformer/duplication": "memshard.experiments.reformer.duplication",
    "reformer/images": "memshard.experiments.reformer.images",
    "reformer/lengths": "memshard.experiments.reformer.lengths",
}


@dataclass(frozen=True)
class Experiment:
    """One experiment of a paper.

    what: one line. points: returns the runs of a scale: smoke (minutes), small (what the results in
    docs/ were measured with) or full (as published). run: runs one point on one thread and returns
    its result as plain JSON values. report: returns a text in Markdown from all points with their
    results, and writes pictures to the folder. hours: rough processor time of a scale on one core.
    alone: whether a point measures time, and so has to run after all others, one at a time.
    """

    what: str
    points: Callable[[Scale], list[Point]]
    run: Callable[[Point], dict[str, Any]]
    report: Callable[[list[tuple[Point, dict[str, Any]]], Path], str]
    hours: dict[Scale, float]
    alone: Callable[[Point], bool] = lambda point: False


def names() -> list[str]:
    """Return the names of all experiments."""
    return list(_PATHS)


def find(name: str) -> Experiment:
    """Return the experiment of that name. ValueError if there is none."""
    if name not in _PATHS:
        raise ValueError(f"there is no experiment {name}: choose one of {', '.join(_PATHS)}")
    path = _PATHS[name]
    experiment: Experiment = resolve_name(path if ":" in path else f"{path}:EXPERIMENT")
    return experiment
