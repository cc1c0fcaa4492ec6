"""Models that experiments train with the trainer: runs that resume, each in a folder named by a
hash of all its settings.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memshard.data_pipeline.format.index import INDEX_FILE
from memshard.lock import holding
from memshard.models.config import ModelConfig
from memshard.models.seq2seq import build_model
from memshard.models.transformer import Transformer
from memshard.trainer.config.load import dump, load_recipe
from memshard.trainer.loop import train
from memshard.trainer.run import Run
from memshard.trainer.set_up import set_up


def recipe_text(point: dict[str, Any]) -> str:
    """Return all settings of a model as text: its recipe with overrides, and its data's index."""
    recipe = load_recipe(point["recipe"], point["overrides"])
    index = Path(recipe.data.path, INDEX_FILE)
    # The data's index has the hashes of all its shards: other data make another run.
    return dump(recipe) + (index.read_text(encoding="utf-8") if index.exists() else "")


def run_folder(point: dict[str, Any], runs: Path) -> Path:
    """Return the run's folder under `runs`. Equal models have one folder."""
    text = recipe_text(point) + point.get("builder", "")
    # 64 bits of the hash: two of a thousand runs collide with probability 3e-14.
    return runs / hashlib.sha256(text.encode()).hexdigest()[:16]


def set_up_run(
    point: dict[str, Any],
    folder: Path,
    build: str,
    builder: Callable[[ModelConfig], Transformer] = build_model,
) -> Run:
    """Return a run of point["recipe"] with point["overrides"], at its last checkpoint if any.

    build: arguments of `memshard data build` for the error message. FileNotFoundError, with the
    command that builds the data, where there is none.
    """
    recipe = load_recipe(point["recipe"], point["overrides"])
    if not Path(recipe.data.path, INDEX_FILE).exists():
        raise FileNotFoundError(
            f"there is no data folder {recipe.data.path}: memshard data build {build} --out "
            f"{recipe.data.path}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return set_up(recipe, folder, device, builder)


def trained_run(point: dict[str, Any], folder: Path, build: str) -> Run:
    """Return the run of `set_up_run` at its last step. Waits for another experiment that trains the
    same one at this moment.
    """
    with holding(folder, "wait", wait=True):
        run = set_up_run(point, folder, build)
        train_to_end(run)
    return run


def train_to_end(run: Run) -> None:
    """Train to the last step. RuntimeError if a signal stops the run before."""
    if not train(run)["finished"]:
        raise RuntimeError(
            f"stopped at step {run.progress.step} of {run.recipe.train.steps}: the same command "
            "goes on from there"
        )
