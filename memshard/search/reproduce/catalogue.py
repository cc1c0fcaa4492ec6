"""The experiments that `memshard reproduce` knows, and what each has to offer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, get_args

Scale = Literal["smoke", "small", "full"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Point = dict[str, Any]
"""Settings of one run, as JSON has them."""

_HOMES = {
    "fast_weights/capacity": "memshard.search.reproduce.retrieval_capacity",
    "fast_weights/language": "memshard.search.reproduce.language",
    "fast_weights/translation": "memshard.search.reproduce.translation",
    "fast_weights/update": "memshard.search.reproduce.retrieval_update",
    "pkm/headline": "memshard.search.reproduce.pkm:HEADLINE",
    "pkm/depth": "memshard.search.reproduce.pkm:DEPTH",
    "pkm/position": "memshard.search.reproduce.pkm:POSITION",
    "pkm/heads": "memshard.search.reproduce.pkm:HEADS",
    "pkm/keys": "memshard.search.reproduce.pkm:KEYS",
    "pkm/flat": "memshard.search.reproduce.pkm:FLAT",
    "pkm/gates": "memshard.search.reproduce.pkm:GATES",
    "pkm/alternatives": "memshard.search.reproduce.pkm:ALTERNATIVES",
    "primer/parts": "memshard.search.reproduce.primer_parts",
    "reformer/duplication": "memshard.search.reproduce.reformer_duplication",
    "reformer/images": "memshard.search.reproduce.reformer_images",
    "reformer/lengths": "memshard.search.reproduce.reformer_lengths",
}


@dataclass(frozen=True)
class Experiment:
    """One experiment of a paper.

    what: one line. points: the runs of a scale: smoke (minutes), small (what the results in docs/ were measured with) or full (as
    published). run: one point's result, as JSON has it, on one thread. report: a text in Markdown from all points with their results;
    pictures go to the folder. hours: rough processor time of a scale on one core. alone: whether a point measures time, and so runs by
    itself, after the others.
    """

    what: str
    points: Callable[[Scale], list[Point]]
    run: Callable[[Point], dict[str, Any]]
    report: Callable[[list[tuple[Point, dict[str, Any]]], Path], str]
    hours: dict[Scale, float]
    alone: Callable[[Point], bool] = lambda point: False


def names() -> list[str]:
    """Of all experiments."""
    return list(_HOMES)


def find(name: str) -> Experiment:
    """The experiment of that name. ValueError if there is none."""
    if name not in _HOMES:
        raise ValueError(f"there is no experiment {name}: choose one of {', '.join(_HOMES)}")
    home = _HOMES[name]
    experiment: Experiment = resolve_name(home if ":" in home else f"{home}:EXPERIMENT")
    return experiment
