"""Median and range of repeated measurements."""

from collections.abc import Sequence
from statistics import median


def spread(values: Sequence[float]) -> dict[str, float]:
    """In the values' unit."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def shown(found: dict[str, float], unit: float, digits: str) -> str:
    """A `spread` as text, in multiples of `unit`. digits: a format, as ",.1f"."""
    return (
        f"{found['median'] / unit:{digits}} ({found['low'] / unit:{digits}} to "
        f"{found['high'] / unit:{digits}})"
    )
