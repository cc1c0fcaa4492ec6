"""Why a DNA is no candidate."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rejected:
    """status: invalid, shape, band, leak, length or nonfinite, in the order in which they are
    looked for. reason: one line.
    """

    status: str
    reason: str
