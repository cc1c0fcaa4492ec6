"""The reason why a DNA is not a candidate."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rejected:
    """A DNA that failed a check. status: invalid, shape, band, leak, length or nonfinite, in the
    order of the checks. reason: one line.
    """

    status: str
    reason: str
