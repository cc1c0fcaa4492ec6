"""Several measurements of the same, as text."""

import statistics
from collections.abc import Sequence
from typing import Any


def mean_deviation(values: list[float], digits: str) -> str:
    """Mean +- standard deviation; of one value, that alone. digits: a format, as ".2f"; its sign is
    for the mean.
    """
    deviation = f" +- {statistics.stdev(values):{digits.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{deviation}"


def median_range(values: Sequence[float], digits: str) -> str:
    """Median of measured times or rates, and the ends between which they lie."""
    return (
        f"{statistics.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"
    )


def low_high(values: Sequence[float | None], digits: str) -> str:
    """Range of measurements that may lie decades apart, where means say nothing. None is one that
    diverged.
    """
    numbers = [value for value in values if value is not None]
    lost = len(values) - len(numbers)
    ends = (
        dict.fromkeys(f"{end:{digits}}" for end in (min(numbers), max(numbers))) if numbers else {}
    )
    return ", ".join(
        [
            *([" to ".join(ends)] if ends else []),
            *([f"{lost} diverged" if ends else "diverged"] if lost else []),
        ]
    )


def seeds(number: int) -> str:
    """What `mean_deviation` shows of so many seeds."""
    return f"mean +- standard deviation of {number} seeds" if number > 1 else "one seed"


def ranges(rows: Sequence[tuple[dict[str, Any], Any]]) -> str:
    """What `low_high` shows of points and their results."""
    number = len({point["seed"] for point, _ in rows})
    return f"range of {number} seeds" if number > 1 else "one seed"
