"""Repeated measurements as text, and results as compact JSON."""

import json
from pathlib import Path
from typing import Any

from memshard.experiments.common import compact_json
from memshard.experiments.common.clock import interleave
from memshard.experiments.common.repeated import (
    low_high,
    mean_deviation,
    median_low_high,
    median_range,
    range_text,
    ranges,
    ratios,
)


def test_means_and_ranges() -> None:
    assert (
        mean_deviation([1.0, 2.0, 3.0], "+.1f") == "+2.0 +- 1.0"
        and mean_deviation([1.0], ".2f") == "1.00"
    )
    assert median_range([3.0, 1.0, 2.0], ".1f") == "2.0 (1.0 to 3.0)"
    assert (
        low_high([0.4, 1e-5], ".2g") == "1e-05 to 0.4" and low_high([0.501, 0.502], ".2g") == "0.5"
    )
    assert (
        low_high([None, None], ".2g") == "diverged"
        and low_high([0.5, None], ".2g") == "0.5, 1 diverged"
    )
    assert (
        ranges([({"seed": 1}, {}), ({"seed": 1}, {})]) == "one seed"
        and ranges([({"seed": s}, {}) for s in (1, 7)]) == "range of 2 seeds"
    )
    assert median_range([3e-3, 1e-3, 2e-3], ".0f", 1e-3) == "2 (1 to 3)"
    assert range_text(median_low_high([2.0, 4.0]), ".1f") == "3.0 (2.0 to 4.0)"
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_all_take_turns_and_the_first_round_does_not_count() -> None:
    turns: list[str] = []
    ticks = iter(range(100))
    actions = {name: lambda name=name: turns.append(name) for name in "ab"}
    seconds = interleave(actions, 2, lambda: float(next(ticks)))
    assert turns == ["a", "b"] * 3 and seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_arrays_take_a_line_and_the_content_is_the_same(tmp_path: Path) -> None:
    value: dict[str, Any] = {
        "curve": [[step, step / 3] for step in range(200)],
        "points": [{"key": "k" * 90, "result": {"loss": None, "pixels": [1, 2]}}] * 2,
        "nothing": {},
        "text": "a\nb",
    }
    compact_json.write(value, tmp_path / "new" / "result.json")
    text = (tmp_path / "new" / "result.json").read_text()
    assert json.loads(text) == value
    assert text.splitlines()[1].startswith(' "curve": [[0,0.0],[1,')
    assert '   "result": {"loss": null, "pixels": [1, 2]}\n' in text
    assert len(text.splitlines()) == 15
