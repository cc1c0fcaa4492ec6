"""Check an installation, or a run, and say what is wrong with it."""

import importlib.metadata
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import memshard
from memshard.io import file_time, parse_json, read_small
from memshard.launch.env import lacks_kernels
from memshard.models.kernels import plain_rows
from memshard.models.kernels.backend import SWITCH, backend_for
from memshard.trainer.checkpoint.folders import (
    committed,
    no_marker,
    unfinished,
    without_marker,
)
from memshard.trainer.checkpoint.hashed_pieces import verify
from memshard.trainer.checkpoint.save_load import DamagedCheckpoint, index_of, load_state, step_of
from memshard.trainer.watch.heartbeat import describe_stragglers, read_beats, silent
from memshard.trainer.watch.lost_ranks import FLIGHT
from memshard.trainer.watch.metrics import METRICS_FILE, numbers, read_metrics
from memshard.variables import switch

# Seconds; DeepSpeed's longest extension compiles in a few minutes.
_STALE_LOCK = 600
_STALLED = 0.2


@dataclass(frozen=True)
class Finding:
    """One line of text, and whether it asks for something to be done."""

    text: str
    bad: bool = False


def check_installation() -> Iterator[Finding]:
    """Yield findings about versions, devices, kernels, host name, launchers and stale locks."""
    yield Finding(f"torch {torch.__version__}, memshard {memshard.__version__}")
    for package, use in (
        ("deepspeed", "train.engine deepspeed, launch deepspeed"),
        ("fairscale", "parallel.tensor above 1"),
    ):
        try:
            yield Finding(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(f"no {package}: needed for {use} only")
    yield from _devices()
    yield from _name()
    programs = [
        name
        for name in ("sbatch", "srun", "torchrun", "deepspeed", "pdsh", "mpirun")
        if shutil.which(name)
    ]
    yield Finding(f"launchers here: {', '.join(programs) or 'none'}")
    yield from stale_locks()


def stale_locks() -> Iterator[Finding]:
    """Yield the locks that a killed compilation of torch's extensions (DeepSpeed's) left behind.
    Every later compilation waits for them without end.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    for lock in sorted(root.glob("**/lock")):
        age = time.time() - lock.stat().st_mtime
        # A younger lock may belong to a compilation that is going on.
        if age > _STALE_LOCK:
            yield Finding(
                f"{lock} is {age / 60:.0f} minutes old: if nothing is compiling, delete it",
                bad=True,
            )


def check_run(folder: Path, deep: bool = False) -> Iterator[Finding]:
    """Yield who is late, which collectives ranks disagree about, which locks are stale, which
    checkpoints are good, and whether reading data slows the run down.

    deep: check all tensors of all checkpoints against their hashes, which takes as long as loading
    them. ValueError if the folder is no run.
    """
    if not (folder / "config.yaml").exists():
        missing = "it holds no config.yaml" if folder.exists() else "it does not exist"
        raise ValueError(f"{folder} is no run folder: {missing}")
    yield from _ranks(folder)
    yield from _collectives(folder)
    yield from stale_locks()
    yield from _checkpoints(folder / "checkpoints", deep)
    lines = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
    # The last ten lines: a slow start, with cold caches, says nothing about now.
    waits = [wait for _, wait in numbers(lines, "speed/data_wait")][-10:]
    if waits:
        share = sum(waits) / len(waits)
        advice = (
            ": raise data.workers, or put the data on a faster disk" if share > _STALLED else ""
        )
        yield Finding(
            f"{share:.0%} of the last steps' time went into reading data{advice}",
            bad=share > _STALLED,
        )


def _devices() -> Iterator[Finding]:
    _, which = backend_for(torch.device("cpu"))
    yield Finding(f"tables on the CPU: {which}")
    if not torch.cuda.is_available():
        yield Finding("no GPU is visible")
        return
    built = torch.cuda.get_arch_list()
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        problem = lacks_kernels((major, minor), built)
        advice = f": {problem}" if problem else ""
        yield Finding(
            f"GPU {number}: {torch.cuda.get_device_name(number)}, capability "
            f"{major}.{minor}{advice}",
            bad=problem is not None,
        )
        if problem is None:
            yield _tables_on(number, (major, minor))


def _tables_on(number: int, capability: tuple[int, int]) -> Finding:
    """Return which code serves tables on a GPU; bad where Triton's kernels should and do not."""
    backend, which = backend_for(torch.device("cuda", number))
    # On older GPUs the kernels are only tried.
    slow = backend is plain_rows and capability >= (8, 0) and not switch(SWITCH, "plain")
    advice = (
        ": Triton compiles with gcc and Python's headers (Debian: gcc, python3-dev)" if slow else ""
    )
    return Finding(f"tables on GPU {number}: {which}{advice}", bad=slow)


def _name() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        yield Finding(f"this host's name, {name}, has no address: add it to /etc/hosts", bad=True)
        return
    note = (
        "; for several hosts set GLOO_SOCKET_IFNAME where memshard finds no interface"
        if address.startswith("127.")
        else ""
    )
    yield Finding(f"this host, {name}, is {address}{note}")


def _ranks(folder: Path) -> Iterator[Finding]:
    beats, now = read_beats(folder), file_time(folder)
    if not beats:
        yield Finding("no heartbeats: the run has not started")
        return
    for text in describe_stragglers(beats, now):
        yield Finding(text, bad=True)
    alive = [beat for beat in beats if beat.ended is None and not silent(beat, now)]
    ended = sorted({beat.ended for beat in beats if beat.ended is not None})
    others = f"; others: {', '.join(ended)}" if ended else ""
    yield Finding(
        f"{len(alive)} of {beats[0].ranks} ranks live{others}; rank {beats[0].rank} has finished "
        f"step {beats[0].step}"
    )
    if alive:
        longest = max(now - beat.since for beat in alive)
        yield Finding(f"the longest that a rank has been where it is: {longest:.0f} s")


def _collectives(folder: Path) -> Iterator[Finding]:
    """Find the rank that has joined fewer collectives than the others, from the records that ranks
    wrote when they lost each other.
    """
    last: dict[str, dict[int, dict[str, Any]]] = {}
    for path in (folder / FLIGHT).glob("rank*.json"):
        try:
            rank = int(path.stem[4:])
            for entry in parse_json(read_small(path))["entries"]:
                group, number = str(entry["process_group"][1]), int(str(entry["collective_seq_id"]))
                # Entries are in order, so the last one of a group stays.
                last.setdefault(group, {})[rank] = {**entry, "collective_seq_id": number}
        # A record may be cut short: its rank was killed while it wrote.
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
    for group, by_rank in sorted(last.items()):
        numbers = {rank: entry["collective_seq_id"] for rank, entry in by_rank.items()}
        # Every rank counts a group's collectives alike, so the lowest count is the rank that did
        # not come.
        if len(set(numbers.values())) > 1:
            behind = min(numbers, key=lambda rank: numbers[rank])
            ahead = by_rank[max(numbers, key=lambda rank: numbers[rank])]
            yield Finding(
                f"when they lost each other, rank {behind} was at collective {numbers[behind]} of "
                f"group {group}, "
                f"others at {ahead['collective_seq_id']} ({ahead.get('profiling_name')}, sizes "
                f"{ahead.get('input_sizes')})"
            )


def _checkpoints(root: Path, deep: bool) -> Iterator[Finding]:
    checkpoints = committed(root)
    # The newest first: it is the one a run goes on from.
    for path in reversed(checkpoints):
        try:
            step_of(path, load_state(path))
            index = index_of(path)
            if deep:
                verify(path, index)
        except ValueError as error:
            damage = (
                error
                if isinstance(error, DamagedCheckpoint)
                else DamagedCheckpoint(path, str(error))
            )
            yield Finding(str(damage), bad=True)
        except OSError as error:
            yield Finding(f"{path} cannot be read ({error})", bad=True)
        else:
            yield Finding(
                f"{path} is "
                + ("good" if deep else "complete, with files as long as they should be")
                + ("" if deep else " (--deep reads them)")
            )
    for path in without_marker(root):
        yield Finding(no_marker(path), bad=True)
    for path in sorted(unfinished(root)) if root.exists() else ():
        yield Finding(
            f"{path} is not complete: a save goes on, or was interrupted; the next one removes it"
        )
    if not checkpoints:
        yield Finding(f"no checkpoint in {root} yet")
