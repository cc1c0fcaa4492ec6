"""Repeated measurements, summarised and as text."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def median_low_high(values: Sequence[float]) -> dict[str, float]:
    """Return the median, lowest and highest value, as result files have them."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def range_text(measured: Mapping[str, float], digits: str, unit: float = 1.0) -> str:
    """Return a `median_low_high` as "median (low to high)", in multiples of `unit`.

    digits: a format, such as ",.1f".
    """
    median, low, high = (f"{measured[key] / unit:{digits}}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def median_range(values: Sequence[float], digits: str, unit: float = 1.0) -> str:
    """Return "median (low to high)" of measured times or rates."""
    return range_text(median_low_high(values), digits, unit)


def ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return each time over the base's time in the same round.

    What slows a shared machine for a second slows both sides of a round, and cancels.
    """
    return [time / other for time, other in zip(times, base, strict=True)]


def mean_deviation(values: list[float], digits: str) -> str:
    """Return "mean +- standard deviation"; of a single value, that alone.

    digits: a format, such as "+.2f"; its sign is shown for the mean only.
    """
    deviation = f" +- {statistics.stdev(values):{digits.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{deviation}"


def low_high(values: Sequence[float | None], digits: str) -> str:
    """Return "low to high" of measurements that may be decades apart, where means say nothing.

    None is a run that diverged.
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
    """Say in words what `mean_deviation` shows of that many seeds."""
    return f"mean +- standard deviation of {number} seeds" if number > 1 else "one seed"


def ranges(rows: Sequence[tuple[dict[str, Any], Any]]) -> str:
    """Say in words what `low_high` shows of these points, from the seeds in them."""
    number = len({point["seed"] for point, _ in rows})
    return f"range of {number} seeds" if number > 1 else "one seed"
