"""Checkpoint folders of a run: what counts as committed, which is newest, which may go."""

import shutil
from pathlib import Path

COMMIT = "COMMITTED"
_PREFIX = "step-"


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lives under a run's `checkpoints` folder."""
    return root / f"{_PREFIX}{step:08d}"


def committed(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(
        path.parent
        for path in root.glob(f"{_PREFIX}*/{COMMIT}")
        if path.parent.name[len(_PREFIX) :].isdigit()
    )


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints that a path means, best first: itself, or the committed ones of a run folder.
    ValueError if there is none.
    """
    if (path / COMMIT).exists():
        return [path]
    found = committed(path / "checkpoints")
    if not found:
        what = "does not exist" if not path.exists() else "holds no committed checkpoint"
        raise ValueError(
            f"{path} {what}: give a run folder (such as runs/quickstart) or one of its "
            f"checkpoints/{_PREFIX}* folders"
        )
    return found[::-1]


def remove(path: Path) -> None:
    """Remove a checkpoint."""
    (path / COMMIT).unlink()  # first: a half-removed folder must not look complete
    shutil.rmtree(path)


def prune(root: Path, keep: int, keep_every: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints and those of steps that `keep_every` divides,
    and what interrupted saves left behind.
    """
    for path in committed(root)[:-keep]:
        if not keep_every or int(path.name[len(_PREFIX) :]) % keep_every:
            remove(path)
    for path in root.glob(f"{_PREFIX}*"):
        if path.suffix == ".tmp" or not (path / COMMIT).exists():
            shutil.rmtree(path)


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name that no reader takes for one; returns its new path."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)
