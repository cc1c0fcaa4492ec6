"""A run's numbers at Weights & Biases. Its one importer."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.trainer.config.load import to_dict
from memshard.trainer.config.recipe import Recipe

if TYPE_CHECKING:
    import wandb


def check_installed() -> None:
    """ValueError where the package is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "train.wandb needs the package wandb: pip install 'memshard[wandb]', or leave "
            "train.wandb out"
        )


def begin(folder: Path, recipe: Recipe, lines: list[dict[str, Any]]) -> "wandb.Run":
    """The W&B run of a run folder, the same one at every start. RuntimeError where W&B refuses.

    lines: of metrics.jsonl so far. W&B cannot resume what is offline, and a second file of the same
    run replaces the first when it is uploaded: there each start's file begins with them.
    """
    import wandb

    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    known = folder / "wandb/run_id"
    try:
        run = wandb.init(
            project=recipe.train.wandb,
            name=folder.resolve().name,
            id=known.read_text() if known.exists() else None,
            resume="allow",
            dir=folder,
            config=to_dict(recipe),
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise RuntimeError(
            f"train.wandb: {error}; WANDB_MODE=offline keeps the numbers in {folder}/wandb"
        ) from error
    known.write_text(run.id)
    # W&B's own count of steps takes no line for a step that came before, such as after a rewind.
    run.define_metric("*", step_metric="step")
    if run.offline:
        for line in lines:
            run.log({name: value for name, value in line.items() if value is not None})
    return run
