"""`memshard launch deepspeed` over two hosts with a real sshd: 127.0.0.1 and 127.0.0.2, by
DeepSpeed's launcher and pdsh.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.runs import SHORT
from tests.launch.slurm_cluster import free_ports
from tests.trainer.tiny_run import assert_same, checkpoint_state

SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [
    name
    for name in ("sshd", "ssh", "ssh-keygen", "pdsh")
    if shutil.which(name, path=SYSTEM_PATH) is None
]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.getuid() != 0, reason="sshd starts sessions for root only"),
]


@pytest.fixture
def ssh() -> Iterator[tuple[int, Path]]:
    """Return the daemons' port, and a folder with an `ssh` that needs no settings in
    the home folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="sshd-"))
    sshd = shutil.which("sshd", path=SYSTEM_PATH)
    assert sshd is not None
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPasswordAuthentication "
        "no\nPermitRootLogin yes\n"
        "StrictModes no\nUsePAM no\nPidFile none\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\nIdentityFile {folder}/user\nStrictHostKeyChecking no\nUserKnownHostsFile "
        "/dev/null\nLogLevel ERROR\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n'
    )
    (folder / "bin/ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    port = free_ports(1)
    listen = [f"-oListenAddress=127.0.0.{host}:{port}" for host in (1, 2)]
    with (folder / "sshd.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sshd, "-D", "-e", "-f", folder / "sshd_config", *listen], stderr=log
        )
    try:
        deadline = time.monotonic() + 30
        while subprocess.run(
            [folder / "bin/ssh", "-p", str(port), "127.0.0.2", "true"], capture_output=True
        ).returncode:
            assert daemon.poll() is None and time.monotonic() < deadline, (
                folder / "sshd.log"
            ).read_text()
            time.sleep(0.1)
        yield port, folder / "bin"
    finally:
        daemon.terminate()
        daemon.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def test_deepspeeds_launcher_over_two_hosts(
    ssh: tuple[int, Path], recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    port, programs = ssh
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    folder = tmp_path / "run"
    options = [
        "--hostfile",
        str(tmp_path / "hosts"),
        "--ssh-port",
        str(port),
        "--master-addr",
        "127.0.0.1",
        "--run",
        str(folder),
    ]
    command = [
        sys.executable,
        "-m",
        "memshard",
        "launch",
        "deepspeed",
        str(recipe),
        *SHORT,
        *options,
    ]
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launcher     DeepSpeed" in done.stdout and "ranks: 2" in done.stdout, done.stdout
    assert_same(checkpoint_state(folder), checkpoint_state(undisturbed / "short"))
