"""Read which process of how many this is from the environment variables that launchers set.

Loads nothing heavy.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

from memshard.launch.launchers.kinds import LAUNCHERS
from memshard.variables import read_number

PORTS = 10_000
"""Jobs share this many port numbers, from 20,000 on."""


@dataclass(frozen=True)
class Ranks:
    """launcher: who set the variables, in words. local_rank: number among this host's ranks.
    address, port: where rank 0 listens, if known. parent_waits: whether the process that started
    this one lives as long as the ranks, so that they are orphans without it.
    """

    launcher: str
    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    address: str | None = None
    port: int | None = None
    parent_waits: bool = False


def read_ranks(env: Mapping[str, str]) -> Ranks:
    """Return what the first launcher that knows the variables says; else what RANK and WORLD_SIZE
    say, or OpenMPI's; else one process alone.
    """
    for launcher in LAUNCHERS.values():
        ranks: Ranks | None = import_module(launcher.module).detect(env)
        if ranks is not None:
            return ranks
    return from_variables(env, "RANK and WORLD_SIZE") or _openmpi(env) or Ranks("none")


def from_variables(
    env: Mapping[str, str], launcher: str, parent_waits: bool = False
) -> Ranks | None:
    """Return what torch's names (RANK, WORLD_SIZE and so on) say; None if they are not set."""
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    rank, ranks = read_number(env, "RANK"), read_number(env, "WORLD_SIZE")
    if rank >= ranks:
        raise ValueError(
            f"RANK is {rank} and WORLD_SIZE {ranks}: ranks count from 0, so set RANK below "
            "WORLD_SIZE, or unset both"
        )
    return Ranks(
        launcher,
        rank,
        ranks,
        read_number(env, "LOCAL_RANK", "0"),
        *listening(env),
        parent_waits,
    )


def listening(env: Mapping[str, str]) -> tuple[str | None, int | None]:
    """Return MASTER_ADDR and MASTER_PORT, as far as they are set."""
    port = read_number(env, "MASTER_PORT", "0")
    if port >= 1 << 16:
        raise ValueError(f"MASTER_PORT is {port}; ports are below 65536")
    return env.get("MASTER_ADDR"), port or None


def job_port(job: int) -> int:
    """Return a port that another job on the same nodes is not likely to use."""
    return 20_000 + job % PORTS


def _openmpi(env: Mapping[str, str]) -> Ranks | None:
    """Return what mpirun says, for users who start it themselves."""
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    address, port = listening(env)
    ranks = read_number(env, "OMPI_COMM_WORLD_SIZE", "1")
    # All ranks are on this host, so no one has to say where rank 0 is.
    if address is None and ranks == read_number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", "1"):
        address = "127.0.0.1"
    # crc32 of the job's name, since hash() differs from process to process and all must agree.
    return Ranks(
        "OpenMPI",
        read_number(env, "OMPI_COMM_WORLD_RANK"),
        ranks,
        read_number(env, "OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        address,
        port or job_port(zlib.crc32(env.get("PMIX_NAMESPACE", "").encode())),  # the job's name
    )
