"""A run's folder: who may write to it, and which recipes may resume the run in it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from memshard.io import atomic_write, check_folder, check_free, read_small
from memshard.lock import FolderLock, holding
from memshard.parallel.collectives import broadcast_from_rank0
from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.checkpoint.save_load import check_files
from memshard.trainer.config.diff import diff
from memshard.trainer.config.explain import fields
from memshard.trainer.config.load import dump, load_recipe
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.watch.heartbeat import FOLDER as HEARTBEATS

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
MOST_METRICS = 1 << 34
"""Bytes of a metrics.jsonl; a million lines have some 500 MB."""
_OVERWRITTEN = (CONFIG_FILE, METRICS_FILE, "deepspeed.json")


@contextmanager
def held_by_rank0(folder: Path) -> Iterator[FolderLock | None]:
    """Hold the run's folder for all ranks; yields rank 0's lock, and None on the others.

    FolderHeld, on all ranks, if another start has it; OSError if nothing can be written there.
    """
    with ExitStack() as stack:
        lock, problem = None, None
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                lock = stack.enter_context(
                    holding(folder, "stop it, or choose another folder with --run")
                )
            except (ValueError, OSError) as error:
                problem = error
        problem = broadcast_from_rank0(problem)
        if problem is not None:
            raise problem
        yield lock


def check_identity(folder: Path, recipe: Recipe) -> None:
    """Raise ValueError, with the differences, if the folder has a run of another model, data order
    or optimizer: of a recipe that differs in more than keys that may change on resume. ValueError
    as well if it has no run, but files with the names of a run's.
    """
    for name in (CHECKPOINTS, HEARTBEATS, "log", "tensorboard"):
        check_folder(folder / name)
        if name != "tensorboard":  # which a run does without
            _check_access(folder / name, os.W_OK | os.X_OK)
    for path in (*(folder / name for name in _OVERWRITTEN), *(folder / "log").glob("rank*.log")):
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(f"{path} is no file: remove it")
        _check_access(path, os.R_OK | (os.W_OK if path.suffix == ".log" else 0))
        if path.name == METRICS_FILE and path.exists() and path.stat().st_size > MOST_METRICS:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes: move it away")
    checkpoints = committed(folder / CHECKPOINTS)
    if not checkpoints and not _is_run(folder):
        check_free(folder, _OVERWRITTEN, "choose another folder with --run")
        return
    changeable = {key.name: key.may_change for key in fields()}
    stored = _stored_recipe(folder, checkpoints)
    # Those of early versions leave the buckets of LSH to the length.
    stored = replace(stored, model=stored.model.for_length(stored.data.length))
    # And the order of texts, which was contiguous; that of records has no name.
    if stored.data.order == "auto" != recipe.data.order:
        stored = replace(stored, data=replace(stored.data, order="contiguous"))
    changes = [change for change in diff(stored, recipe) if not changeable[change[0]]]
    if changes:
        listed = "; ".join(f"{key}: {old} there, {new} here" for key, old, new in changes)
        raise ValueError(
            f"{folder} holds another run ({listed}): choose the same settings, or another folder "
            f"with --run, where init_from={folder} begins with what this run has learned"
        )


def _check_access(path: Path, mode: int) -> None:
    """Raise ValueError for what the run could not use: at its first save, or in silence."""
    effective = os.access in os.supports_effective_ids
    if path.exists() and not os.access(path, mode, effective_ids=effective):
        raise ValueError(
            f"{path} cannot be {'written' if mode & os.W_OK else 'read'}: mend its "
            "permissions, or choose another folder with --run"
        )


def _stored_recipe(folder: Path, checkpoints: list[Path]) -> Recipe:
    """Return the recipe of the newest sound checkpoint, else the run's: that file has no hash, and
    someone may have cut or removed it.
    """
    for checkpoint in reversed(checkpoints):
        with suppress(ValueError):
            check_files(checkpoint)
            return load_recipe(str(checkpoint / CONFIG_FILE))
    return load_recipe(str(folder / CONFIG_FILE))


def _is_resolved(recipe: Path) -> bool:
    """Return whether a file holds a recipe as memshard writes it, with every key and no comment."""
    try:
        return read_small(recipe) == dump(load_recipe(recipe)).encode()
    except ValueError:
        return False


def _is_run(folder: Path) -> bool:
    # The heartbeat proves it for runs of earlier versions, whose recipes had other keys.
    return (folder / CONFIG_FILE).exists() and (
        (folder / HEARTBEATS / "rank0.json").exists() or _is_resolved(folder / CONFIG_FILE)
    )


def write_config(folder: Path, recipe: Recipe) -> None:
    """Save the resolved recipe in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CONFIG_FILE, durable=True) as file:
        file.write_text(dump(recipe), encoding="utf-8")
