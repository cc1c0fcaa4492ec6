"""Models that experiments train: runs of the trainer, which resume, in folders named after all that
made them.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memshard.data_pipeline.format.index import INDEX_FILE
from memshard.models.config import ModelConfig
from memshard.models.seq2seq import build_model
from memshard.models.transformer import Transformer
from memshard.trainer.config.load import dump, load_recipe
from memshard.trainer.loop import train
from memshard.trainer.run import Run
from memshard.trainer.set_up import set_up


def settings(point: dict[str, Any]) -> str:
    """All that a model is made of: the recipe named by `point` with its overrides, and its data."""
    recipe = load_recipe(point["recipe"], point["overrides"])
    index = Path(recipe.data.path, INDEX_FILE)
    return dump(recipe) + (index.read_text() if index.exists() else "")


def folder_of(point: dict[str, Any], runs: Path) -> Path:
    """The run's folder under `runs`."""
    text = settings(point) + point.get("builder", "")
    return runs / hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare(
    point: dict[str, Any],
    folder: Path,
    build: str,
    builder: Callable[[ModelConfig], Transformer] = build_model,
) -> Run:
    """A run of point["recipe"] with point["overrides"]. build: arguments of `memshard data build`,
    for the error.

    FileNotFoundError, with the command that builds it, without the data.
    """
    recipe = load_recipe(point["recipe"], point["overrides"])
    if not Path(recipe.data.path, INDEX_FILE).exists():
        raise FileNotFoundError(
            f"there is no data folder {recipe.data.path}: memshard data build {build} --out "
            f"{recipe.data.path}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return set_up(recipe, folder, device, builder)


def finish(run: Run) -> None:
    """Train to the end. RuntimeError if a signal stops it before."""
    if not train(run)["finished"]:
        raise RuntimeError(
            f"stopped at step {run.progress.step} of {run.recipe.train.steps}: the same command "
            "goes on from there"
        )
