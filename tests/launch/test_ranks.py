"""Who this process is, from the variables that each launcher really sets."""

import re
import subprocess
import sys

import pytest

from memshard.launch.cli.main import main
from memshard.launch.cli.outcome import UsageError
from memshard.launch.launchers.slurm import first_host
from memshard.launch.ranks import Ranks, read_ranks

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "43061",
    "TORCHELASTIC_RUN_ID": "7",
    "GROUP_RANK": "1",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.99.0.1",
    "MASTER_PORT": "29500",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "21234",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}
STEP = {
    **BATCH_SCRIPT,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "3204513793",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (TORCHRUN, Ranks("torchrun", 5, 8, 1, "n1", 43061, True)),
        (DEEPSPEED, Ranks("DeepSpeed", 3, 4, 1, "10.99.0.1", 29500, True)),
        ({**STEP, **TORCHRUN}, Ranks("torchrun", 5, 8, 1, "n1", 43061, True)),
        ({**STEP, **DEEPSPEED}, Ranks("DeepSpeed", 3, 4, 1, "10.99.0.1", 29500, True)),
        (STEP, Ranks("SLURM", 3, 4, 1, "gpu07", 21234)),
        (
            {**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "5000"},
            Ranks("SLURM", 3, 4, 1, "head", 5000),
        ),
        (BATCH_SCRIPT, Ranks("none")),
        (OPENMPI, Ranks("OpenMPI", 1, 2, 1, "127.0.0.1", 21147)),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Ranks("OpenMPI", 1, 2, 1, None, 21147)),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            Ranks("RANK and WORLD_SIZE", 0, 2, 0, "a", None),
        ),
        ({}, Ranks("none")),
    ],
)
def test_each_launcher(env: dict[str, str], expected: Ranks) -> None:
    assert read_ranks(env) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("a,b", "a"),
        ("n[3-5,9]", "n3"),
        ("127.0.0.[1-2]", "127.0.0.1"),
        ("gpu[03-05]-ib,login1", "gpu03-ib"),
        ("rack[1-2]n[03,05-9],login1", "rack1n03"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_launcher_that_says_too_little_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from memshard.launch.env import joined_ranks

    for name, value in {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(
            UsageError,
            match="OpenMPI started 2 ranks and does not say where rank 0 listens: set MASTER_ADDR",
        ),
        joined_ranks(9),
    ):
        pass


def test_local_rank_as_an_argument_is_tolerated(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=1", "config", "explain", "train.keep"]) == 0
    assert main(["config", "--local-rank=1", "explain", "train.keep"]) == 0
    assert capfd.readouterr().out.count("train.keep: integer") == 2


def test_torchrun_sets_what_the_table_says() -> None:
    # One write a rank: pieces of two ranks' lines would mix.
    said = "os.write(1, f'{r.launcher} {r.rank} {r.ranks}\\n'.encode())"
    code = (
        "import os; from memshard.launch.ranks import read_ranks as read; r = "
        f"read(os.environ); {said}"
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
    ]
    done = subprocess.run(
        [*torchrun, sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert sorted(re.findall(r"torchrun \d \d", done.stdout)) == ["torchrun 0 2", "torchrun 1 2"], (
        done.stdout + done.stderr
    )
