"""A run's folder: who may write to it, and which recipes may resume the run in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from memshard.io import atomic_write
from memshard.lock import FolderLock, holding
from memshard.parallel.collectives import broadcast_from_rank0
from memshard.trainer.config.diff import diff
from memshard.trainer.config.explain import fields
from memshard.trainer.config.load import dump, load_recipe
from memshard.trainer.config.recipe import Recipe

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"


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
    or optimizer: of a recipe that differs in more than keys that may change on resume.
    """
    config = folder / CONFIG_FILE
    if not config.exists():
        return
    changeable = {key.name: key.may_change for key in fields()}
    changes = [
        change for change in diff(load_recipe(str(config), []), recipe) if not changeable[change[0]]
    ]
    if changes:
        listed = "; ".join(f"{key}: {old} there, {new} here" for key, old, new in changes)
        raise ValueError(
            f"{folder} holds another run ({listed}): choose another folder with --run, or the "
            "same settings"
        )


def write_config(folder: Path, recipe: Recipe) -> None:
    """Save the resolved recipe in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CONFIG_FILE) as file:
        file.write_text(dump(recipe))
