"""Write and read checkpoints: tensors through torch's distributed checkpoint (DCP), everything else as JSON."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from memshard.trainer.checkpoint.folders import COMMIT

_STATE = "state.json"
_REMEDY = "copy it again, or delete that folder to go on from the checkpoint before it"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], files: list[Path]) -> None:
    """Write a checkpoint: into a temporary folder, then commit marker, then rename. All ranks take part.

    state: JSON values, rank 0's count. files: copied in, so that the checkpoint stands alone.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    temporary = folder.with_name(folder.name + ".tmp")
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier()
    with _one_line_errors(f"{temporary} could not be written", "is the disk full?"):
        dcp.save(tensors, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    if first:
        for file in files:
            shutil.copy2(file, temporary / file.name)
        (temporary / _STATE).write_text(json.dumps(state, indent=1))
        with (temporary / COMMIT).open("w") as marker:
            os.fsync(marker.fileno())
        shutil.rmtree(folder, ignore_errors=True)  # a folder without commit marker may stand there
        os.replace(temporary, folder)
    _barrier()


def load_tensors(folder: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors in place from a checkpoint saved on any number of ranks; ValueError if it is damaged.

    alone: read in this process only.
    """
    with _one_line_errors(f"{folder} is damaged", _REMEDY):
        dcp.load(tensors, checkpoint_id=folder, no_dist=alone or not dist.is_initialized())


def load_state(folder: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint; ValueError if they are damaged."""
    try:
        state: dict[str, Any] = json.loads((folder / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / _STATE} is damaged ({error}): {_REMEDY}") from error
    return state


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _one_line_errors(what: str, remedy: str) -> Iterator[None]:
    """DCP's exceptions, whose text is every rank's traceback and which no `except Exception` catches, as ValueError.

    Its warnings about its own use of deprecated torch calls, and that a single process needs no process group, are dropped.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise ValueError(f"{what} ({type(reason).__name__}: {reason}): {remedy}") from error
