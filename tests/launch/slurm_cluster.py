"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd as children, all
their files in one folder.

Nodes are named 127.0.0.1 and 127.0.0.2, so that names in SLURM_JOB_NODELIST resolve without
/etc/hosts.
"""

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
_NODES = 2

# proctrack/linuxproc and task/none need no cgroups. cred_expire=5: a requeued job waits for its old
# credential to expire.
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.[1-2] Port=[{first}-{last}] \\
  CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Up while the context lasts. env: what its clients need."""

    def __init__(self) -> None:
        # munged wants a socket that everyone can reach, which pytest's folders are not.
        self.folder = folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "SlurmCluster":
        folder = self.folder
        (folder / "state").mkdir()
        folder.chmod(0o755)
        port = free_ports(_NODES + 1)
        values = {
            "host": socket.gethostname().partition(".")[0],
            "user": getpass.getuser(),
            "folder": folder,
        }
        text = _CONFIG.format(**values, port=port, first=port + 1, last=port + _NODES)
        (folder / "slurm.conf").write_text(text)
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = [
            f"--{name}={folder}/munge.{end}"
            for name, end in (("socket", "sock"), ("pid-file", "pid"), ("seed-file", "seed"))
        ]
        self._start(
            "munged",
            "munged",
            "--foreground",
            f"--key-file={key}",
            f"--log-file={folder}/munge.log",
            *files,
        )
        self._wait_until(lambda: (folder / "munge.sock").exists())
        self._start("slurmctld", "slurmctld", "-D")
        for node in range(1, _NODES + 1):
            self._start(f"slurmd{node}", "slurmd", "-D", "-N", f"127.0.0.{node}")
        self._wait_until(
            lambda: (
                self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split() == ["idle"] * _NODES
            )
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--full", "--signal=KILL", "--user", getpass.getuser(), check=False)
        self.run("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 10
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.1)
        for name in reversed(self._daemons):
            daemon = self._daemons[name]
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True) -> str:
        """Return the output of a client command."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def state(self, job: str) -> str:
        """Return the state of a job: PENDING, RUNNING, COMPLETING, ...; empty once it is gone from
        the queue.
        """
        return self.run("squeue", "-h", "-j", job, "-o", "%T", check=False).strip()

    def wait_for_end(self, job: str, timeout: float = 180) -> None:
        """Wait until the job, with all the tasks of an array, is completed."""
        self._wait_until(lambda: self._states(job) == {"COMPLETED"}, timeout)

    def _states(self, job: str) -> set[str]:
        return set(re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", job)))

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as out:
            program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
            assert program is not None
            options = {
                "stdin": subprocess.DEVNULL,
                "stdout": out,
                "stderr": subprocess.STDOUT,
                "start_new_session": True,
            }
            self._daemons[name] = subprocess.Popen([program, *command[1:]], env=self.env, **options)

    def _wait_until(self, condition, timeout: float = 30) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + timeout
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            assert not dead, (
                f"{dead} ended: {[(self.folder / f'{name}.out').read_text() for name in dead]}"
            )
            assert time.monotonic() < deadline, f"not after {timeout} s; see {self.folder}"
            time.sleep(0.1)


def missing_programs() -> list[str]:
    """Return what has to be installed first."""
    return [
        name
        for name in PROGRAMS
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]


def free_ports(count: int) -> int:
    """Return the first of some neighbouring ports that are free now."""
    for first in range(16_800, 30_000, count):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("0.0.0.0", port))
            return first
        except OSError:
            continue
        finally:
            for opened in sockets:
                opened.close()
    raise AssertionError("no free ports")
