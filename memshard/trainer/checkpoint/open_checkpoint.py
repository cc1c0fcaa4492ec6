"""Open a checkpoint or an export, to read it by tensors and rows through memory maps."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memshard.data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer
from memshard.io import is_absence, parse_json, read_small
from memshard.models.memory.product_key import row_slots
from memshard.models.memory.table import find_tables
from memshard.models.seq2seq import build_model
from memshard.trainer.checkpoint.hashed_pieces import verify
from memshard.trainer.checkpoint.memmap import MappedTensor
from memshard.trainer.checkpoint.save_load import (
    DamagedCheckpoint,
    index_of,
    is_count,
    load_state,
    step_of,
)
from memshard.trainer.config.load import load_recipe
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.precision import DTYPES

CONFIG_JSON = "config.json"
WEIGHTS = "model.safetensors"
PREFIX = "model."
SCALE = "scale"
"""Name of the factors, one a row, that go with the `weight` of a table in int8."""


@dataclass(frozen=True)
class StoredModel:
    """A model whose tensors are read on demand; names are those of the model. All files are open,
    so that a run may remove its checkpoint under whoever reads it.

    dense: functions that return a parameter or buffer. tables: functions that return rows of a
    table, [n, dim] in table_dtype, for row numbers [n] int64 as in training.
    """

    folder: Path
    recipe: Recipe
    step: int
    tokenizer: Tokenizer
    dense: dict[str, Callable[[], Tensor]]
    tables: dict[str, Callable[[Tensor], Tensor]]
    table_dtype: torch.dtype


def is_export(folder: Path) -> bool:
    """Return whether `memshard export` wrote the folder."""
    return (folder / CONFIG_JSON).is_file() and (folder / WEIGHTS).is_file()


def open_checkpoint(folder: Path, check: bool = True) -> StoredModel:
    """Open a committed checkpoint. DamagedCheckpoint if it is not sound.

    check: compare everything with its hash first.
    """
    step = step_of(folder, load_state(folder))
    recipe = _recipe(folder)
    index = {
        name.removeprefix(PREFIX): tensor
        # The optimizer's tensors have other prefixes and are not read.
        for name, tensor in index_of(folder).items()
        if name.startswith(PREFIX)
    }
    if check:
        try:
            verify(folder, index)
        except ValueError as error:
            raise DamagedCheckpoint(folder, str(error)) from error
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in index.items()}
    names = _table_keys(folder, recipe, kinds)
    stored = {name: MappedTensor(folder, tensor) for name, tensor in index.items()}
    tables = {name: stored.pop(f"{name}.weight") for name in names}
    return StoredModel(
        folder=folder,
        recipe=recipe,
        step=step,
        tokenizer=Tokenizer(folder / TOKENIZER_FILE),
        dense={name: tensor.whole for name, tensor in stored.items()},
        tables={name: tensor.rows for name, tensor in tables.items()},
        # All tables of a model have one dtype.
        table_dtype=next((tensor.dtype for tensor in tables.values()), torch.float32),
    )


def open_export(folder: Path, check: bool = True) -> StoredModel:
    """Open an export. check: compare the weights with their hash first, and not the small files
    alone. ValueError if damaged.
    """
    file = folder / WEIGHTS
    try:
        config = parse_json(read_small(folder / CONFIG_JSON))
        about = config["memshard"]
        # transformers builds the model from it; exports of older versions have no hash.
        if about.get("model_sha256") not in (None, sha256_json(config["model"])):
            raise ValueError(f"the model in {CONFIG_JSON} does not match its hash")
        for name in ("config.yaml", TOKENIZER_FILE):
            if hashlib.sha256(read_small(folder / name)).hexdigest() != about["files"][name]:
                raise ValueError(f"{name} does not match its hash")
        if not is_count(about["step"]):
            raise ValueError(f"{CONFIG_JSON} says that it is of step {about['step']!r}"[:200])
        recipe = _recipe(folder)
        if check:
            with file.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != about["sha256"]:
                    raise ValueError(f"{WEIGHTS} does not match its hash")
        with safe_open(file, "pt") as opened:
            # On the CPU, tensors of an open file are views of its memory map.
            tensors = {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        scales = {
            f"{name.removesuffix('weight')}{SCALE}"
            for name, tensor in tensors.items()
            if tensor.dtype == torch.int8
        }
        kinds = {
            name: (tuple(tensor.shape), _read_dtype(name, tensor, tensors))
            for name, tensor in tensors.items()
            if name not in scales
        }
        tables = {
            name: (tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.{SCALE}", None), keys)
            for name, keys in _table_keys(folder, recipe, kinds).items()
        }
        return StoredModel(
            folder=folder,
            recipe=recipe,
            step=about["step"],
            tokenizer=Tokenizer(folder / TOKENIZER_FILE),
            dense={name: tensor.clone for name, tensor in tensors.items()},
            tables={name: partial(_read_slots, *stored) for name, stored in tables.items()},
            table_dtype=next(
                (
                    torch.float32 if scale is not None else values.dtype
                    for values, scale, _ in tables.values()
                ),
                torch.float32,
            ),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, OSError) and not is_absence(error):
            raise
        raise ValueError(
            f"{folder} is damaged ({type(error).__name__}: {error}): export it again"
        ) from error


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value of JSON, whatever the order of keys and the white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _recipe(folder: Path) -> Recipe:
    recipe = load_recipe(str(folder / "config.yaml"), [])
    # Those of early versions leave the buckets of LSH to the length.
    return replace(recipe, model=recipe.model.for_length(recipe.data.length))


def _read_slots(values: Tensor, scale: Tensor | None, keys: int | None, rows: Tensor) -> Tensor:
    slots = rows if keys is None else row_slots(rows, keys)
    # Exports are in slot order, i1 * keys + i2, and training's rows in Morton order.
    return values[slots] if scale is None else values[slots].float() * scale[slots, None]


def _read_dtype(name: str, values: Tensor, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that a tensor of an export has once it is read."""
    scale = tensors.get(f"{name.removesuffix('weight')}{SCALE}")
    scaled = scale is not None and scale.shape == values.shape[:1] and scale.is_floating_point()
    return torch.float32 if values.dtype == torch.int8 and scaled else values.dtype


def _table_keys(
    folder: Path, recipe: Recipe, kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, int | None]:
    """Return the names of the model's tables, with their `keys`. ValueError unless the tensors that
    the folder holds are the model's: a recipe of a terabyte is refused before anything is
    allocated.
    """
    if recipe.model.layers > len(kinds):
        raise ValueError(
            f"{folder} does not fit its recipe: {recipe.model.layers} layers, and "
            f"{len(kinds)} tensors"
        )
    # On meta a model of any size takes no memory, but a layer some milliseconds.
    with torch.device("meta"):
        model = build_model(recipe.model)
    wanted = {
        name: (tuple(tensor.shape), tensor.is_floating_point())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    if missing := wanted.keys() ^ kinds.keys():
        raise ValueError(
            f"{folder} does not fit its recipe: {', '.join(sorted(missing)[:3])} are in only one "
            "of them"
        )
    for name, (shape, floating) in wanted.items():
        there, dtype = kinds[name]
        if there != shape:
            raise ValueError(
                f"{folder} does not fit its recipe: {name} is {list(there)} there and "
                f"{list(shape)} here"
            )
        if (dtype in DTYPES.values()) != floating:
            raise ValueError(f"{folder} does not fit its recipe: {name} is {dtype} there")
    return {name: table.keys for name, table in find_tables(model)}
