"""The checkpoint folders of a run: which are committed, which is newest, which to remove."""

import os
import shutil
from pathlib import Path

from memshard.io import is_absence

COMMIT = "COMMITTED"
_PREFIX = "step-"


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint under `root`, a run's `checkpoints` folder."""
    return root / f"{_PREFIX}{step:08d}"


def committed(root: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first. OSError if the folder cannot be read."""
    try:
        # Not by glob, which passes over folders that cannot be read: a run would begin anew.
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted(
        root / name
        for name in names
        if name.startswith(_PREFIX)
        and name[len(_PREFIX) :].isdigit()
        and _is_committed(root / name)
    )


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints that a path stands for, newest first: the path itself, or the
    committed ones of a run folder. ValueError if there is none.
    """
    if _is_committed(path):
        return [path]
    folders = committed(path / "checkpoints")
    if not folders:
        what = "does not exist" if not path.exists() else "holds no committed checkpoint"
        raise ValueError(
            f"{path} {what}: give a run folder (such as runs/quickstart) or one of its "
            f"checkpoints/{_PREFIX}* folders"
        )
    return folders[::-1]


def remove(path: Path) -> None:
    """Remove a checkpoint folder."""
    (path / COMMIT).unlink()  # first: a half-removed folder must not look complete
    shutil.rmtree(path)


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Remove all checkpoints except the newest `keep` and those of steps that `keep_every` divides;
    remove what interrupted saves left.
    """
    for path in committed(root)[:-keep]:
        if not keep_every or int(path.name[len(_PREFIX) :]) % keep_every:
            remove(path)
    for path in root.glob(f"{_PREFIX}*"):
        if path.suffix == ".tmp" or not _is_committed(path):
            shutil.rmtree(path)


def _is_committed(path: Path) -> bool:
    try:
        (path / COMMIT).stat()
    except OSError as error:
        if not is_absence(error):
            raise
        return False
    return True


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that no reader finds it; return its new path."""
    # Without the prefix, by which all others look for checkpoints.
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)
