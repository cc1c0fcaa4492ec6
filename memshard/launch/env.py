"""Join the other ranks."""

import atexit
import fcntl
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from memshard.launch.cli.outcome import usage_errors
from memshard.launch.ranks import Ranks, read_ranks
from memshard.trainer.watch.lost_ranks import NCCL_GRACE

_SIOCGIFADDR = 0x8915


@contextmanager
def joined_ranks(timeout: float) -> Iterator[tuple[torch.device, Ranks]]:
    """Join the process group that a launcher has prepared, if any (see `read_ranks`), and leave it
    at the end.

    timeout: seconds that collectives wait for a rank. Yields this rank's device (a GPU where there
    is one, else the CPU) and what the launcher said. UsageError if it did not say enough.
    """
    with usage_errors():
        ranks = read_ranks(os.environ)
        device = _device(ranks)
    if ranks.ranks == 1:
        try:
            yield device, ranks
        finally:
            if dist.is_initialized():  # DeepSpeed needs a group even for one process
                dist.destroy_process_group()
        return
    with usage_errors():
        _publish(ranks)
    # torch then records the last collectives, for `memshard doctor`.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout + (NCCL_GRACE if device.type == "cuda" else 0)),
    )
    try:
        yield device, ranks
    except Exception:
        atexit.register(_leave_at_once)
        raise
    if tensor := sys.modules.get("memshard.parallel.tensor"):
        tensor.leave()
    dist.destroy_process_group()


def _device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible > 1 and ranks.local_rank >= visible:
        raise ValueError(
            f"process {ranks.local_rank} of this host finds {visible} GPUs: start {visible} ranks "
            "a host"
        )
    # With one GPU bound to each task, it is number 0 for all of them.
    device = torch.device("cuda", ranks.local_rank if visible > 1 else 0)
    torch.cuda.set_device(device)
    problem = lacks_kernels(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
    if problem:
        raise ValueError(f"{torch.cuda.get_device_name(device)}: {problem}")
    return device


def lacks_kernels(capability: tuple[int, int], built: list[str]) -> str | None:
    """Return what to install if the installed torch has no kernels for a GPU; None if it has.

    capability: of the GPU, such as (7, 0). built: `torch.cuda.get_arch_list()`: sm_XY is machine
    code, which runs on the same major version from minor version Y on; compute_XY can be compiled
    for anything newer.
    """
    major, minor = capability
    versions = [
        (kind, int(x), int(y))
        for arch in built
        for kind, x, y in re.findall(r"^(sm|compute)_(\d+)(\d)[a-z]?$", arch)
    ]
    if not versions or any(
        (x, y) <= capability and (kind == "compute" or x == major) for kind, x, y in versions
    ):
        return None
    lowest = min((x, y) for _, x, y in versions)
    advice = (
        "install torch's build for CUDA 12.6 (docs/volta.md)"
        if capability < lowest
        else "install a newer torch"
    )
    return (
        f"this torch has no code for GPUs of capability {major}.{minor}, only "
        f"{', '.join(built)}: {advice}"
    )


def _publish(ranks: Ranks) -> None:
    """Set the variables that torch, DeepSpeed and fairscale read."""
    if ranks.address is None or ranks.port is None:
        raise ValueError(
            f"{ranks.launcher} started {ranks.ranks} ranks and does not say where rank 0 listens: "
            "set MASTER_ADDR to its host and "
            "MASTER_PORT to a free port on all ranks (mpirun: -x MASTER_ADDR=HOST -x "
            "MASTER_PORT=29500)"
        )
    os.environ.update(
        RANK=str(ranks.rank), WORLD_SIZE=str(ranks.ranks), LOCAL_RANK=str(ranks.local_rank)
    )
    os.environ.update(MASTER_ADDR=ranks.address, MASTER_PORT=str(ranks.port))
    interface = reachable_interface(ranks.address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def reachable_interface(address: str) -> str | None:
    """Return the network interface by which to reach other hosts, if gloo would not find it: it
    takes the address of the host's own name, which Debian's /etc/hosts sets to 127.0.1.1. None if
    gloo is right, or if nothing is known.
    """
    try:
        if not _loopback(socket.gethostbyname(socket.gethostname())) or socket.gethostbyname(
            address
        ).startswith("127.0.0."):
            return None
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # A connected UDP socket has the address from which this host would send: the
            # route, for free.
            probe.connect((address, 9))  # sends nothing
            local = probe.getsockname()[0]
            addresses = {name: _address_of(name, probe) for _, name in socket.if_nameindex()}
    except OSError:
        return None
    outside = [name for name, ip in addresses.items() if ip is not None and not _loopback(ip)]
    towards = [name for name in outside if addresses[name] == local]
    if towards:
        return towards[0]
    return outside[0] if len(outside) == 1 else None


def _address_of(interface: str, probe: socket.socket) -> str | None:
    try:
        answer = fcntl.ioctl(
            probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15])
        )
    except OSError:  # it has no IPv4 address
        return None
    return socket.inet_ntoa(answer[20:24])


def _loopback(ip: str) -> bool:
    return ip.startswith("127.")


def _leave_at_once() -> None:
    """End the process without leaving the group, which would wait seconds for the lost ranks and
    may end in an abort of gloo's threads (exit code -6).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
