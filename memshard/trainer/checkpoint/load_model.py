"""A trained model in one process, whatever number of ranks trained it."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.tokenizer import Tokenizer
from memshard.models.memory.table import externalize_tables
from memshard.models.transformer import Transformer
from memshard.trainer.checkpoint.folders import find_checkpoints
from memshard.trainer.checkpoint.store import DamagedCheckpoint, load_state, load_tensors
from memshard.trainer.checkpoint.tensors import model_tensors
from memshard.trainer.config.load import load_recipe
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.precision import store_tables


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tables whole and hidden; its tokenizer and recipe; where it comes from."""

    model: Transformer
    tokenizer: Tokenizer
    recipe: Recipe
    step: int
    path: Path

    def check_tokenizer(self, data: str) -> None:
        """ValueError unless the data folder was built with this model's tokenizer."""
        if load_index(data).tokenizer_sha256 != self.tokenizer.sha256:
            raise ValueError(f"{data} was built with another tokenizer than {self.path}: its tokens mean nothing to this model")


def load(path: str | Path) -> LoadedModel:
    """Load a checkpoint, or the newest good one of a run folder, on CPU. ValueError if there is none."""
    folders = find_checkpoints(Path(path))
    for folder in folders[:-1]:
        try:
            return _load(folder)
        except DamagedCheckpoint as problem:
            warnings.warn(f"{problem.folder} is damaged ({problem.reason}): the checkpoint before it is read", stacklevel=2)
    return _load(folders[-1])


def _load(folder: Path) -> LoadedModel:
    state = load_state(folder)
    recipe = load_recipe(str(folder / "config.yaml"), [])
    with torch.device("meta"):
        model = Transformer(recipe.model)
    externalize_tables(model)
    store_tables(model, recipe.tables.dtype)
    model.to_empty(device="cpu")
    load_tensors(folder, model_tensors(model, {}, None), alone=True)
    return LoadedModel(model.eval(), Tokenizer(folder / "tokenizer.model"), recipe, state["progress"]["step"], folder)
