"""torchrun over two hosts with network namespaces of their own: one is killed, comes back or does
not, and the run ends as if nothing had happened.

Each host's own name means 127.0.1.1 to it, as Debian has it, so that gloo by itself would offer
others an address that is theirs.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from memshard.trainer.checkpoint.folders import checkpoint_folder, committed, remove
from memshard.trainer.watch.heartbeat import read_beats
from tests.distributed import run_distributed
from tests.launch.runs import LONG, STEPS, wait_for_step
from tests.trainer.tiny_run import assert_same, checkpoint_state, numbers, train_run

ENV = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
ADDRESSES = {"n1": "10.99.0.1", "n2": "10.99.0.2"}


def _possible() -> bool:
    """Return whether namespaces can be made here."""
    if os.getuid() != 0 or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        return False
    return (
        subprocess.run(
            ["unshare", "--net", "--uts", "--mount", "true"], capture_output=True
        ).returncode
        == 0
    )


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        not _possible(), reason="needs root, iproute2 and the right to make namespaces"
    ),
]


class Hosts:
    """Two hosts on one wire."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        self.names = {host: f"{host}-{os.getpid()}" for host in ADDRESSES}
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Hosts":
        for name in self.names.values():
            self._ip("netns", "add", name)
        first, second = self.names.values()
        self._ip(
            "link",
            "add",
            "eth0",
            "netns",
            first,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            second,
        )
        for host, name in self.names.items():
            self._ip("-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._ip("-n", name, "link", "set", device, "up")
            others = "".join(
                f"{address} {other}\n" for other, address in ADDRESSES.items() if other != host
            )
            (self.folder / host).write_text(f"127.0.0.1 localhost\n127.0.1.1 {host}\n{others}")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            self.kill(process)
        for name in self.names.values():
            self._ip("netns", "del", name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, host: str, log: Path, *command: str, **env: str) -> "subprocess.Popen[bytes]":
        """Start a command on a host, in a process group of its own."""
        enter = [
            "nsenter",
            f"--net=/run/netns/{self.names[host]}",
            "unshare",
            "--uts",
            "--mount",
            "--propagation",
            "slave",
            "--",
        ]
        script = f'hostname "$0"; mount --bind {self.folder / host} /etc/hosts; exec "$@"'
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*enter, "bash", "-c", script, host, *command],
                env={**os.environ, **env},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill a command with its processes at once, as a power cut does."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts() as hosts:
        yield hosts


def _torchrun(nodes: str, recipe: Path, folder: Path) -> list[str]:
    options = [
        f"--nnodes={nodes}",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=n1:29400",
        "--rdzv-id=test",
        "--rdzv-conf=last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3",
    ]
    train = [
        "memshard",
        "train",
        str(recipe),
        *LONG,
        "train.save_every=20",
        "train.keep=20",
        "--run",
        str(folder),
    ]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "--", *train]


def _cut_off(hosts: Hosts, folder: Path, agent: "subprocess.Popen[bytes]") -> None:
    """Kill all that runs on n2 for the run."""
    assert {beat.host for beat in read_beats(folder)} == {"n1", "n2"}
    for beat in read_beats(folder):
        if beat.host == "n2":
            os.kill(beat.pid, signal.SIGKILL)  # torchrun's ranks have sessions of their own
    hosts.kill(agent)


def _wait(processes: "Sequence[subprocess.Popen[bytes]]", folder: Path) -> str:
    """Wait until all are done; return what n1 said."""
    for process in processes:
        assert process.wait(240) == 0, [
            path.read_text()[-3000:] for path in (folder / "log").glob("*.out")
        ]
    said = (folder / "log/n1.out").read_text()
    assert "on n2), in step " in said and "has been silent for" in said
    return said


def test_a_host_that_is_killed_and_comes_back(
    hosts: Hosts, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / "log").mkdir(parents=True)
    command = _torchrun("2", recipe, folder)
    first, second = (
        hosts.start(host, folder / f"log/{host}.out", *command, **ENV) for host in ADDRESSES
    )
    wait_for_step(folder, 45)
    _cut_off(hosts, folder, second)
    second = hosts.start("n2", folder / "log/n2.out", *command, **ENV)
    assert "(resumes at step 40, to step 250)" in _wait((first, second), folder)
    state, expected = checkpoint_state(folder), checkpoint_state(undisturbed / "long")
    assert_same(state, expected)


def _finish(rank: int, world: int, recipe: Path, folder: Path) -> None:
    train_run(recipe, folder, *LONG)


def test_a_host_that_never_comes_back(
    hosts: Hosts, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The other goes on from the checkpoint of both: bit for bit as any one rank from there, and
    but for rounding as both.
    """
    folder, alone = tmp_path / "run", tmp_path / "alone"
    (folder / "log").mkdir(parents=True)
    command = _torchrun("1:2", recipe, folder)
    first, second = (
        hosts.start(host, folder / f"log/{host}.out", *command, **ENV) for host in ADDRESSES
    )
    wait_for_step(folder, 45)
    _cut_off(hosts, folder, second)
    said = _wait([first], folder)
    assert "ranks: 2" in said and "ranks: 1" in said
    (resumed,) = map(int, re.findall(rf"\(resumes at step (\d+), to step {STEPS}\)", said))
    assert 40 <= resumed < STEPS
    assert [(beat.rank, beat.host, beat.ended) for beat in read_beats(folder)] == [
        (0, "n1", "done")
    ]
    losses, expected = numbers(folder, "train/loss"), numbers(undisturbed / "long", "train/loss")
    both = range(1, resumed + 1)
    assert [losses[step] for step in both] == [expected[step] for step in both]
    assert losses[resumed + 1] == pytest.approx(
        expected[resumed + 1], rel=1e-6
    ) and losses == pytest.approx(expected, rel=5e-3)

    shutil.copytree(folder, alone)
    for checkpoint in committed(alone / "checkpoints"):
        if checkpoint > checkpoint_folder(alone / "checkpoints", resumed):
            remove(checkpoint)
    run_distributed(_finish, 1, recipe, alone)
    assert_same(checkpoint_state(folder), checkpoint_state(alone))
