"""Send a run's numbers to Weights & Biases; the only file that imports wandb."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.redact import shown
from memshard.trainer.config.load import to_dict
from memshard.trainer.config.recipe import Recipe

if TYPE_CHECKING:
    import wandb


def check_installed() -> None:
    """Raise ValueError if the package is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "train.wandb needs the package wandb: pip install 'memshard[wandb]', or leave "
            "train.wandb out"
        )


def _published(recipe: Recipe) -> Recipe:
    """Return the recipe without passwords, which addresses and commands of data hold."""
    data = recipe.data
    mixture = {shown(name): weight for name, weight in data.mixture.items()}
    return replace(recipe, data=replace(data, path=shown(data.path), mixture=mixture))


def begin(folder: Path, recipe: Recipe, lines: list[dict[str, Any]]) -> "wandb.Run":
    """Return the W&B run of a run folder, the same one at every start. RuntimeError if W&B refuses.

    lines: of metrics.jsonl so far. W&B cannot resume an offline run, and uploading a second file of
    the same run replaces the first, so offline every start's file begins with these lines.
    """
    import wandb

    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    known = folder / "wandb/run_id"
    try:
        run = wandb.init(
            project=recipe.train.wandb,
            name=folder.resolve().name,
            id=known.read_text(encoding="utf-8") if known.exists() else None,
            resume="allow",
            dir=folder,
            config=to_dict(_published(recipe)),
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise RuntimeError(
            f"train.wandb: {error}; WANDB_MODE=offline keeps the numbers in {folder}/wandb"
        ) from error
    known.write_text(run.id, encoding="utf-8")
    # W&B's step counter refuses a step that it has seen, as after a rewind.
    run.define_metric("*", step_metric="step")
    if run.offline:
        for line in lines:
            run.log({name: value for name, value in line.items() if value is not None})
    return run
