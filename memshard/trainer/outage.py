"""Data that cannot be read: all ranks stop alike, where one alone would leave the others waiting,
or train on other rows than a second run.
"""

from memshard.data_pipeline.fetch import Unreachable
from memshard.data_pipeline.stream.reader import DamagedData

NO_DATA = (Unreachable, DamagedData)
"""For now, and for good."""
NoData = Unreachable | DamagedData


def counted(away: NoData | None) -> list[int]:
    """Return what to sum over all ranks for `check_away`: 1 for each kind of error that is this
    rank's.
    """
    return [int(isinstance(away, kind)) for kind in NO_DATA]


def check_away(away: NoData | None, unreachable: int, damaged: int) -> None:
    """Raise this rank's own error, or the kind that as many other ranks have."""
    if away is not None:
        raise away
    for ranks, kind in ((damaged, DamagedData), (unreachable, Unreachable)):
        if ranks:
            raise kind(f"{ranks} other ranks could not read their data; their logs say why")
