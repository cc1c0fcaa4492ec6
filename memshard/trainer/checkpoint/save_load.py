"""Write and read checkpoints: tensors by torch's distributed checkpoint (DCP), the rest as JSON."""

import errno
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from memshard.io import is_absence, named, parse_json, partial_path, read_small, to_disk
from memshard.parallel.collectives import broadcast_from_rank0
from memshard.trainer.checkpoint.dcp_storage import PieceReader, PieceWriter
from memshard.trainer.checkpoint.folders import COMMIT, named_step, set_aside
from memshard.trainer.checkpoint.index import StoredTensor, read_index

log = logging.getLogger(__name__)

_STATE = "state.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint is not as it was written; the message names the folder, `reason` the piece."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(folder, reason)
        self.folder, self.reason = folder, reason

    def __str__(self) -> str:
        return (
            f"{self.folder} is damaged ({self.reason}): copy it again, or delete that folder "
            "to go on from the checkpoint before it"
        )


def save_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    files: dict[str, bytes],
    *,
    group: dist.ProcessGroup | None = None,
    in_place: Collection[str] = (),
    free: Callable[[], None] = lambda: None,
    committed: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint into a temporary folder, add the commit marker, rename the folder. All
    ranks call it; OSError on all of them if it fails, and then nothing of it stays.

    state: JSON values; rank 0's are written. files: content by name, so that the checkpoint needs
    no other folder. group: of all ranks, by default the run's. free: called once the tensors may
    change: those of `in_place` are written by then, the others copied. committed: called on rank 0
    at the end.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    # Next to the final folder: a rename is atomic only within one file system.
    # A name that nothing else has, so that nothing of anyone's is in the way.
    temporary = _from_rank0(partial_path(folder), group)
    try:
        with _same_outcome(group, folder):
            if first:
                temporary.mkdir(parents=True)
        _expect_one_process()
        try:
            dcp.save(
                tensors,
                storage_writer=PieceWriter(temporary, in_place, free),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
        except CheckpointException as error:
            kind = OSError if _is_of_disk(error) else RuntimeError
            raise kind(f"{folder} could not be written ({_reason(error)})") from error
        with _same_outcome(group, folder):
            if first:
                files = {**files, _STATE: json.dumps(state, indent=1).encode()}
                for name, content in files.items():
                    with named(temporary / name):
                        (temporary / name).write_bytes(content)
                _commit(temporary, folder)
                committed()
    except OSError:
        # All ranks have the error, so none writes here any more. What is left of a full disk is
        # for the next save.
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _expect_one_process() -> None:
    """Silence DCP's warning about a single process. For good: `catch_warnings` on a thread would
    hide the warnings of all threads.
    """
    warnings.filterwarnings(
        "ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning
    )


def _commit(temporary: Path, folder: Path) -> None:
    """Flush everything to disk, then the marker with the hashes of all files but the tensors'
    (whose hashes the index has), then rename the folder.
    """
    hashes = {}
    for file in sorted(temporary.iterdir()):
        if file.suffix != ".bin":
            hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            to_disk(file)
    # After all others: the marker on disk proves that everything it lists is.
    with named(temporary / COMMIT):
        (temporary / COMMIT).write_text(json.dumps(hashes), encoding="utf-8")
    to_disk(temporary / COMMIT)
    to_disk(temporary)
    # Atomic: a reader sees the whole checkpoint or none. The entry in the parent folder is on disk
    # only once that is flushed as well.
    try:
        os.replace(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        # Without a marker, such as an interrupted copy: whose it is, is not known.
        log.warning("%s was in the way: it is %s now", folder, set_aside(folder, "unfinished"))
        os.replace(temporary, folder)
    to_disk(folder.parent)


def load_tensors(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors in place from a checkpoint saved on any number of ranks. DamagedCheckpoint, on
    all ranks, if it is damaged; OSError, on all ranks, if a file cannot be read.

    alone: only this process reads.
    """
    alone = alone or not dist.is_initialized()
    index = index_of(folder) if alone else _read_on_rank0(lambda: index_of(folder))
    _expect_one_process()
    try:
        dcp.load(tensors, storage_reader=PieceReader(folder, index), no_dist=alone)
    except CheckpointException as error:
        for problem, _ in error.failures.values():
            if isinstance(problem, OSError) and not is_absence(problem):
                raise problem from error
        raise DamagedCheckpoint(folder, _reason(error)) from error


def load_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's JSON values. DamagedCheckpoint if one of the small files changed."""
    check_files(folder)
    try:
        state: dict[str, Any] = parse_json(read_small(folder / _STATE))
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
    except ValueError as error:
        raise DamagedCheckpoint(folder, f"{_STATE} is no state: {error}") from error
    return state


def step_of(folder: Path, state: dict[str, Any]) -> int:
    """Return the step that a run's checkpoint was saved at. DamagedCheckpoint if its state says
    none, or another than the folder's name.
    """
    try:
        step = state["progress"]["step"]
    except (KeyError, TypeError) as error:
        raise DamagedCheckpoint(folder, f"{_STATE} is no run's ({error})") from error
    if not is_count(step):
        raise DamagedCheckpoint(folder, f"{_STATE} says that it is of step {step!r}"[:200])
    if named_step(folder) not in (step, None):
        raise DamagedCheckpoint(folder, f"it was saved at step {step}, and renamed")
    return int(step)


def table_steps_of(folder: Path, state: dict[str, Any], tables: Iterable[str]) -> dict[str, int]:
    """Return the number of updates of each of these tables. DamagedCheckpoint if the state does not
    say it.
    """
    steps = state.get("table_steps")
    if not isinstance(steps, dict) or not all(is_count(steps.get(table)) for table in tables):
        raise DamagedCheckpoint(folder, f"{_STATE} does not say how often tables were updated")
    return steps


def is_count(value: Any) -> bool:
    """Tell whether a value of JSON is a whole number that torch can hold, from 0 on."""
    # `type(...) is int` refuses true and false, which Python also counts as integers.
    return type(value) is int and 0 <= value < 1 << 62


def load_state_together(folder: Path) -> dict[str, Any]:
    """Return `load_state` of rank 0 on every rank."""
    state: dict[str, Any] = _read_on_rank0(lambda: load_state(folder))
    return state


def index_of(folder: Path) -> dict[str, StoredTensor]:
    """Return the index of a checkpoint's tensors. DamagedCheckpoint if it is not sound."""
    try:
        return read_index(folder)
    except ValueError as error:
        raise DamagedCheckpoint(folder, str(error)) from error


def check_files(folder: Path) -> None:
    """Raise DamagedCheckpoint unless state, recipe, tokenizer and index are what was saved; OSError
    if one cannot be read.
    """
    try:
        hashes = parse_json(read_small(folder / COMMIT))
        for name in hashes:
            # A name such as "../x" would have a file outside the folder read.
            if Path(name).name != name:
                raise ValueError(f"{COMMIT} names {name!r}, which is no file of a checkpoint")
            if hashlib.sha256(read_small(folder / name)).hexdigest() != hashes[name]:
                raise ValueError(f"{name} does not match its hash")
        if _STATE not in hashes:
            raise ValueError(f"{COMMIT} lists no {_STATE}")
    except (OSError, ValueError, TypeError) as error:
        # Set aside as damaged, a sound checkpoint would be lost to a mount that comes back.
        if isinstance(error, OSError) and not is_absence(error):
            raise
        raise DamagedCheckpoint(folder, str(error)) from error


def _is_of_disk(error: CheckpointException) -> bool:
    return all(isinstance(reason, OSError) for reason, _ in error.failures.values())


def _reason(error: CheckpointException) -> str:
    """Return the first failure in a line: the exception's text is every rank's traceback."""
    reason, _ = next(iter(error.failures.values()))
    return f"{type(reason).__name__}: {reason}"


def _read_on_rank0(read: Callable[[], Any]) -> Any:
    """Return what rank 0 reads on every rank; raise its DamagedCheckpoint or
    OSError on every rank.
    """
    value = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            value = read()
        except (DamagedCheckpoint, OSError) as error:
            value = error
    value = broadcast_from_rank0(value)
    if isinstance(value, DamagedCheckpoint | OSError):
        raise value
    return value


def _from_rank0(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Return rank 0's value on every rank of a group of all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


@contextmanager
def _same_outcome(group: dist.ProcessGroup | None, folder: Path) -> Iterator[None]:
    """Raise OSError on every rank if rank 0 has one inside the context, which writes a folder."""
    problem = None
    try:
        yield
    except OSError as error:
        problem = f"{folder} could not be written ({error})"
    if dist.is_initialized():
        # Without this, ranks that had no error would wait in the next collective for rank 0.
        problem = _from_rank0(problem, group)
    if problem is not None:
        raise OSError(problem)
