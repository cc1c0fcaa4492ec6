"""The checkpoint folders of a run: which are committed, which is newest, which to remove."""

import shutil
from pathlib import Path

COMMIT = "COMMITTED"
_PREFIX = "step-"


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint under `root`, a run's `checkpoints` folder."""
    return root / f"{_PREFIX}{step:08d}"


def committed(root: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(
        path.parent
        for path in root.glob(f"{_PREFIX}*/{COMMIT}")
        if path.parent.name[len(_PREFIX) :].isdigit()
    )


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints that a path stands for, newest first: the path itself, or the
    committed ones of a run folder. ValueError if there is none.
    """
    if (path / COMMIT).exists():
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
        if path.suffix == ".tmp" or not (path / COMMIT).exists():
            shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that no reader finds it; return its new path."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)
