"""A run's folder and identity: what may resume here, and what must not."""

from pathlib import Path

from memshard.io import atomic_write
from memshard.trainer.config.diff import diff
from memshard.trainer.config.load import dump, load_recipe
from memshard.trainer.config.recipe import Recipe

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
_FREE_TO_CHANGE = {
    "init_from",
    "data.path",
    "data.damage_tolerance",
    "data.workers",
    *(
        f"train.{key}"
        for key in ("steps", "micro_batch", "precision", "engine", "zero", "offload", "max_skipped")
    ),
    *(
        f"train.{key}"
        for key in ("compile", "profile", "checkpointing", "chunk", "segments", "check_inversion")
    ),
    *(
        f"train.{key}"
        for key in (
            "log_every",
            "wandb",
            "eval_every",
            "eval_tokens",
            "save_every",
            "keep",
            "keep_every",
        )
    ),
    *(f"train.loss_scale.{key}" for key in ("initial", "growth_interval", "backoff", "minimum")),
    *(
        f"guards.{key}"
        for key in ("loss_spike", "threshold", "window", "rewinds", "first_timeout", "timeout")
    ),
    "tables.place",
    *(f"parallel.{key}" for key in ("tensor", "share", "memory", "layout", "checksum_every")),
}


def check_identity(folder: Path, recipe: Recipe) -> None:
    """ValueError, with the differences, if the folder holds a run of another model, data order or
    optimizer.

    More steps, other intervals, other ranks and a data folder that moved (its content is checked by
    hash) are the same run.
    """
    config = folder / CONFIG_FILE
    if not config.exists():
        return
    changes = [
        change
        for change in diff(load_recipe(str(config), []), recipe)
        if change[0] not in _FREE_TO_CHANGE
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
