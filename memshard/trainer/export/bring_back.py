"""From an export back to a checkpoint that `train init_from=` takes."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

from memshard.data_pipeline.tokenizer import TOKENIZER_FILE
from memshard.models.memory.table import find_tables
from memshard.trainer.checkpoint.global_tensors import model_tensors
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.checkpoint.save_load import save_checkpoint
from memshard.trainer.config.load import dump
from memshard.trainer.precision import DTYPES
from memshard.trainer.run_folder import CONFIG_FILE


def bring_back(source: Path, out: Path) -> int:
    """Write the checkpoint, a folder that must be new; returns its step. Moments and their step
    counts, which an export has not, are 0.
    """
    loaded = load_model(source)
    model = loaded.model
    tensors = model_tensors(model, {}, None)
    shapes: dict[str, Tensor] = dict(model.named_parameters())
    tables = dict(find_tables(model))
    shapes |= {f"{name}.weight": table.weight for name, table in tables.items()}
    for name, values in shapes.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = torch.zeros(1).expand(values.shape)
        if name.removesuffix(".weight") in tables:
            tensors[f"last_step.{name}"] = torch.zeros(1).expand(len(values))
        else:
            tensors[f"step.{name}"] = torch.zeros(())
    recipe = loaded.recipe
    for table in tables.values():
        dtype = next(name for name, kind in DTYPES.items() if kind == table.weight.dtype)
        recipe = replace(recipe, tables=replace(recipe.tables, dtype=cast(Any, dtype)))
    state = {
        "progress": {"step": loaded.step},
        "table_steps": dict.fromkeys(tables, 0),
        "stream": None,
    }
    with TemporaryDirectory() as folder:
        config = Path(folder) / CONFIG_FILE
        config.write_text(dump(recipe))
        out.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(out, tensors, state, [config, loaded.path / TOKENIZER_FILE])
    return loaded.step
