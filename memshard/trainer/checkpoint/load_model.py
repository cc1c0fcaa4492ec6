"""Load a trained model into one process, whatever number of ranks trained it."""

import logging
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.tokenizer import Tokenizer
from memshard.models.memory.disk_table import map_tables
from memshard.models.memory.table import externalize_tables, find_tables
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.seq2seq import build_model
from memshard.models.transformer import Transformer
from memshard.trainer.checkpoint.folders import find_checkpoints, is_committed
from memshard.trainer.checkpoint.open_checkpoint import (
    StoredModel,
    is_export,
    open_checkpoint,
    open_export,
)
from memshard.trainer.checkpoint.save_load import DamagedCheckpoint
from memshard.trainer.config.recipe import Recipe

log = logging.getLogger(__name__)

_BLOCK_ROWS = 1 << 14


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tables hidden, in memory or memory-mapped; with its
    tokenizer, its recipe, and the step and folder it comes from.
    """

    model: Transformer
    tokenizer: Tokenizer
    recipe: Recipe
    step: int
    path: Path

    def check_tokenizer(self, data: str) -> None:
        """Raise ValueError unless the data folder was built with this model's tokenizer."""
        if load_index(data).tokenizer_sha256 != self.tokenizer.sha256:
            raise ValueError(
                f"{data} was built with another tokenizer than {self.path}: its tokens mean "
                "nothing to this model"
            )


def load_model(
    path: str | Path, memmap: bool = False, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a run folder (its newest sound checkpoint), a checkpoint or an export. ValueError if
    there is none.

    memmap: leave the tables' values on disk and copy only the rows that are read to the device;
    tables are then not compared with their hashes. device: of the model.
    """
    return load_opened(open_model(path, check=not memmap), memmap, device)


def load_opened(
    stored: StoredModel, memmap: bool = False, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load what `open_model` has opened, as `load_model`."""
    with torch.device("meta"):
        model = build_model(stored.recipe.model)
    model.configure(Recompute(chunk=stored.recipe.train.chunk))
    if memmap:
        map_tables(model, stored.tables)
    tables = dict(find_tables(model))
    for table in externalize_tables(model):
        # Before `to(device)` below, which leaves tables in host memory where they are.
        table.host = stored.recipe.tables.place == "host"
    for table in tables.values():
        table.to(stored.table_dtype)
    model.to_empty(device="cpu")
    _fill(model, stored)
    if not memmap:
        for name, table in tables.items():
            # Block by block, so that the table is in memory once and not twice.
            for first in range(0, table.slots, _BLOCK_ROWS):
                rows = torch.arange(first, min(first + _BLOCK_ROWS, table.slots))
                table.weight[rows[0] : rows[-1] + 1] = stored.tables[name](rows)
    tokenizer = stored.tokenizer
    if tokenizer.vocab_size > (stored.recipe.model.vocab_size or 0):
        raise ValueError(
            f"{stored.folder} has a tokenizer of {tokenizer.vocab_size:,} tokens and a model of "
            f"{stored.recipe.model.vocab_size or 0:,}: it is another model's, copy it again"
        )
    return LoadedModel(
        model.eval().to(device),
        tokenizer,
        stored.recipe,
        stored.step,
        stored.folder,
    )


def open_model(path: str | Path, check: bool = True) -> StoredModel:
    """Open what a path stands for: an export, a checkpoint, or the newest sound one of a run
    folder. ValueError if there is none.

    check: compare everything with its hash first, not only the small files and the index.
    """
    if not isinstance(path, str | PathLike):
        raise TypeError(f"a model is loaded from a path, not from {type(path).__name__}: {path!r}")
    path = Path(path)
    if is_export(path):
        return open_export(path, check)
    damaged: dict[Path, DamagedCheckpoint] = {}
    while True:
        # Anew each time: a run that trains removes old checkpoints under its readers.
        folders = [folder for folder in find_checkpoints(path) if folder not in damaged]
        if not folders:
            raise list(damaged.values())[-1]
        try:
            return open_checkpoint(folders[0], check)
        except (DamagedCheckpoint, FileNotFoundError) as problem:
            if not is_committed(folders[0]):
                continue
            # An older checkpoint costs some steps; a damaged one would cost the evaluation.
            if len(folders) == 1 or not isinstance(problem, DamagedCheckpoint):
                raise
            damaged[folders[0]] = problem
            log.warning(
                "%s is damaged (%s): the checkpoint before it is read",
                problem.folder,
                problem.reason,
            )


def _fill(model: nn.Module, stored: StoredModel) -> None:
    """Fill dense parameters and buffers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        values = stored.dense[name]()
        # Through .data, so that parameters stay leaves and no gradient is recorded.
        tensor.data.copy_(values)
