"""Which process of how many this is, as the launcher's environment variables say. Imports nothing
heavy.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

PORTS = 10_000
"""Jobs share this many port numbers, from 20,000 on."""


@dataclass(frozen=True)
class Ranks:
    """launcher: who set the variables, in words. local_rank: of those on this host. address, port:
    where rank 0 listens, if known.
    """

    launcher: str
    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    address: str | None = None
    port: int | None = None


def read_ranks(env: Mapping[str, str]) -> Ranks:
    """The first that applies of torchrun, DeepSpeed's launcher, plain RANK and WORLD_SIZE, a SLURM
    step, OpenMPI, and nothing.

    torchrun and DeepSpeed come first because they run inside SLURM steps, too. A batch script or an
    interactive shell of SLURM is not a step: what runs there is alone.
    """
    address, port = (
        env.get("MASTER_ADDR"),
        int(env["MASTER_PORT"]) if env.get("MASTER_PORT") else None,
    )
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = (
            "torchrun"
            if "TORCHELASTIC_RUN_ID" in env
            else "DeepSpeed"
            if "CROSS_RANK" in env
            else "RANK and WORLD_SIZE"
        )
        return Ranks(
            launcher,
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", 0)),
            address,
            port,
        )
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        return Ranks(
            "SLURM",
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env.get("SLURM_LOCALID", 0)),
            address or first_host(env.get("SLURM_STEP_NODELIST", "localhost")),
            port or job_port(int(env.get("SLURM_JOB_ID", 0))),
        )
    if "OMPI_COMM_WORLD_RANK" in env:
        ranks, here = (
            int(env["OMPI_COMM_WORLD_SIZE"]),
            int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)),
        )
        alone = "127.0.0.1" if ranks == here else None
        local_rank = int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", 0))
        port = port or job_port(
            zlib.crc32(env.get("PMIX_NAMESPACE", "").encode())
        )  # its name of the job
        return Ranks(
            "OpenMPI", int(env["OMPI_COMM_WORLD_RANK"]), ranks, local_rank, address or alone, port
        )
    return Ranks("no launcher")


def job_port(job: int) -> int:
    """A port that another job on the same nodes is not likely to use."""
    return 20_000 + job % PORTS


def first_host(nodes: str) -> str:
    """The first of a SLURM node list, such as gpu[03-05,9]-ib,login1."""
    found = re.match(r"([^,\[]*)(?:\[([0-9]+)[^\]]*\]([^,\[]*))?", nodes)
    assert found is not None
    return "".join(part or "" for part in found.groups())
