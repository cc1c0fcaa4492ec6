"""The checkpoint folders of a run: which are committed, which is newest, which to remove."""

import logging
import os
import re
import shutil
from itertools import count
from pathlib import Path

from memshard.io import is_absence, is_partial, partial_path
from memshard.trainer.checkpoint.index import INDEX_FILE

log = logging.getLogger(__name__)

COMMIT = "COMMITTED"
_PREFIX = "step-"
# As `checkpoint_folder` writes it: a copy called step-20 would be newer than step-00000040.
_WHOLE = re.compile(rf"{_PREFIX}([0-9]{{8}}|[1-9][0-9]{{8,}})")
# The names that earlier versions gave to folders that were not whole yet.
_OLD_PARTIAL = re.compile(rf"{_PREFIX}\d{{8}}(\.[0-9a-f]{{8}})?\.tmp")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint under `root`, a run's `checkpoints` folder."""
    return root / f"{_PREFIX}{step:08d}"


def named_step(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name; None if it has another kind of name."""
    match = _WHOLE.fullmatch(folder.name)
    return int(match[1]) if match else None


def committed(root: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first. OSError if the folder cannot be read."""
    return [folder for folder in _of_steps(root) if is_committed(folder)]


def without_marker(root: Path) -> list[Path]:
    """Return the folders with a checkpoint's name and index, but no marker, oldest first: of copies
    that go on or were cut short, since a save gives the name last.
    """
    return [
        folder
        for folder in _of_steps(root)
        if not is_committed(folder) and (folder / INDEX_FILE).exists()
    ]


def no_marker(folder: Path) -> str:
    """Return what is wrong with a folder of `without_marker`."""
    return f"{folder} has no {COMMIT}, as if a copy of it were not finished"


def _of_steps(root: Path) -> list[Path]:
    try:
        # Not by glob, which passes over folders that cannot be read: a run would begin anew.
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    steps = sorted(step for name in names if (step := named_step(Path(name))) is not None)
    return [checkpoint_folder(root, step) for step in steps]


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints that a path stands for, newest first: the path itself, or the
    committed ones of a run folder. ValueError if there is none.
    """
    if is_committed(path):
        return [path]
    root = path / "checkpoints"
    folders = committed(root)
    for folder in without_marker(root) if folders else ():
        if (named_step(folder) or 0) > (named_step(folders[-1]) or 0):
            log.warning("%s: the checkpoint before it is read", no_marker(folder))
    if not folders:
        what = "does not exist" if not path.exists() else "holds no committed checkpoint"
        raise ValueError(
            f"{path} {what}: give a run folder (such as runs/quickstart) or one of its "
            f"checkpoints/{_PREFIX}* folders"
        )
    return folders[::-1]


def remove(path: Path) -> None:
    """Remove a checkpoint folder; of a link to one, the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        # A half-removed folder must not look complete, nor like one that is being copied here.
        shutil.rmtree(path.rename(partial_path(path)))


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Remove all checkpoints except the newest `keep`, those of steps that `keep_every` divides and
    links; remove what interrupted saves left. What cannot be removed is named in a warning.
    """
    try:
        old = [
            path
            for path in committed(root)[:-keep]
            if not keep_every or (named_step(path) or 0) % keep_every
        ]
        for path in old + unfinished(root):
            if path.is_dir() and not path.is_symlink():
                remove(path)
    except OSError as error:
        log.warning("an old checkpoint could not be removed: %s", error)


def unfinished(root: Path) -> list[Path]:
    """Return what saves that go on, or were interrupted, have written so far."""
    # Only by names that saves give: whatever else is here was put here by someone.
    return [
        path
        for path in root.iterdir()
        if is_partial(path.name, _WHOLE.pattern) or _OLD_PARTIAL.fullmatch(path.name)
    ]


def is_committed(path: Path) -> bool:
    """Return whether a folder is a complete checkpoint. OSError if that cannot be read."""
    try:
        (path / COMMIT).stat()
    except OSError as error:
        if not is_absence(error):
            raise
        return False
    return True


def set_aside(path: Path, why: str) -> Path:
    """Rename what has a checkpoint's name so that no reader finds it; return its new path, the
    first free one of WHY-NAME, WHY-NAME.2 and so on.
    """
    # Without the prefix, by which all others look for checkpoints.
    names = (f"{why}-{path.name}" + (f".{number}" if number > 1 else "") for number in count(1))
    return path.rename(
        next(new for name in names if not os.path.lexists(new := path.with_name(name)))
    )
