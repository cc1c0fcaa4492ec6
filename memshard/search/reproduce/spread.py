"""Several measurements of the same, as text."""

import statistics


def mean_deviation(values: list[float], digits: str) -> str:
    """Mean +- standard deviation; of one value, that alone. digits: a format, as ".2f"; its sign is for the mean."""
    deviation = f" +- {statistics.stdev(values):{digits.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{deviation}"


def seeds(number: int) -> str:
    """What `mean_deviation` shows of so many seeds."""
    return f"mean +- standard deviation of {number} seeds" if number > 1 else "one seed"
