"""Data that cannot be read for now: all ranks stop alike, where one alone would leave the others
waiting, or train on other rows than a second run.
"""

from memshard.data_pipeline.fetch import Unreachable


def check_away(away: Unreachable | None, ranks_away: int) -> None:
    """Raise Unreachable if a rank could not read its data. away: this rank's own error."""
    if away is not None:
        raise away
    if ranks_away:
        raise Unreachable(f"{ranks_away} other ranks could not read their data; their logs say why")
