"""Starts that stay in the foreground: torchrun on this machine, DeepSpeed's launcher over hosts."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from memshard.launch.launchers.cluster import Cluster
from memshard.launch.launchers.start import CODE, RENDEZVOUS, Start, shell, torchrun_options

_ENV_FILE = "deepspeed_env"


def local_command(start: Start, ranks: int, restarts: int, notice: int) -> list[str]:
    """torchrun on this machine."""
    options = [
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
        *torchrun_options(notice),
    ]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "--", *start.train]


def deepspeed_command(start: Start, hostfile: str, options: list[str]) -> list[str]:
    """DeepSpeed's launcher. options: its own, such as --launcher=openmpi, --include=n1,
    --master_addr=n1, --ssh_port=2222.
    """
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        f"--hostfile={hostfile}",
        *options,
        "--module",
        *start.train,
    ]


def deepspeed_environment(start: Start, cluster: Cluster) -> str:
    """What remote ranks get, as lines of a `.deepspeed_env` file: an ssh session has neither this
    shell's PATH nor its variables.
    """
    values = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": str(cluster.cpus or 1),
    }
    if start.code:
        values |= {"PYTHONPATH": str(Path(start.folder).resolve() / CODE), "PYTHONSAFEPATH": "1"}
    if not cluster.gpus:
        values["DS_ACCELERATOR"] = "cpu"
    if cluster.interface:
        values |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    return _lines(values | dict(cluster.env))


def local_environment() -> str:
    """What torchrun gets on this machine, as lines."""
    return _lines({"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **RENDEZVOUS})


def run_deepspeed(command: list[str], start: Start, environment: str) -> int:
    """Run it; returns its exit code."""
    file = Path(start.folder).resolve() / _ENV_FILE
    file.write_text(environment)
    return run_here(command, environment + f"DS_ENV_FILE={file}\n")


def run_here(command: list[str], environment: str) -> int:
    """Run a launcher with these lines beside its environment, passing signals on; returns its exit
    code. Ctrl-C reaches it by itself.
    """
    print(f"memshard: {shell(command)}", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        command, env=os.environ | dict(line.split("=", 1) for line in environment.splitlines())
    )

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    previous = {
        number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR2)
    }
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _lines(values: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in values.items())
