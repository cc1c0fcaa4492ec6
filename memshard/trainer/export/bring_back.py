"""Turn an export back into a checkpoint, for `memshard train init_from=`."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from memshard.data_pipeline.tokenizer import TOKENIZER_FILE
from memshard.models.memory.table import find_tables
from memshard.trainer.checkpoint.global_tensors import model_tensors
from memshard.trainer.checkpoint.load_model import LoadedModel, load_model
from memshard.trainer.checkpoint.save_load import save_checkpoint
from memshard.trainer.config.load import dump
from memshard.trainer.optim.dense.kinds import DENSE_KINDS
from memshard.trainer.precision import DTYPES
from memshard.trainer.run_folder import CONFIG_FILE


def bring_back(source: Path, out: Path) -> int:
    """Write the checkpoint to a new folder; return its step. Moments and their step counts, which
    an export does not have, are 0.
    """
    return write_checkpoint(load_model(source), out)


def write_checkpoint(loaded: LoadedModel, out: Path) -> int:
    """Write a loaded model as a checkpoint to a new folder, with moments of 0; return its step."""
    model = loaded.model
    tensors = model_tensors(model, {}, None)
    tables = dict(find_tables(model))
    recipe = loaded.recipe
    kind = DENSE_KINDS[recipe.optimizer.kind]
    zero = torch.zeros(())  # expanded below, so that no moments are allocated
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in tables:
            continue
        for moment, shape in kind.moments(tuple(parameter.shape)).items():
            tensors[f"{moment}.{name}"] = zero.expand(shape)
        tensors |= {f"{count}.{name}": zero for count in kind.counts}
    for name, table in tables.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}.weight"] = zero.expand(table.weight.shape)
        tensors[f"last_step.{name}.weight"] = zero.expand(len(table.weight))
    for table in tables.values():
        dtype = next(name for name, kind in DTYPES.items() if kind == table.weight.dtype)
        recipe = replace(recipe, tables=replace(recipe.tables, dtype=cast(Any, dtype)))
    state = {
        "progress": {"step": loaded.step},
        "table_steps": dict.fromkeys(tables, 0),
        # No data: only init_from takes it, a resume refuses.
        "stream": None,
    }
    files = {
        CONFIG_FILE: dump(recipe).encode(),
        TOKENIZER_FILE: loaded.tokenizer.proto,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, tensors, state, files)
    return loaded.step
