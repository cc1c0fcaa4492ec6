"""Export a sharded checkpoint as one safetensors file, without loading the whole model."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memshard.data_pipeline.format.index import sha256_file
from memshard.data_pipeline.tokenizer import TOKENIZER_FILE
from memshard.io import whole_folder
from memshard.models.context import Context
from memshard.models.memory.product_key import slot_rows
from memshard.models.memory.table import ValueTable, find_tables
from memshard.models.random import fold
from memshard.models.seq2seq import build_model
from memshard.trainer.checkpoint.load_model import (
    LoadedModel,
    load_model,
    load_opened,
    open_model,
)
from memshard.trainer.checkpoint.open_checkpoint import (
    CONFIG_JSON,
    PREFIX,
    SCALE,
    WEIGHTS,
    StoredModel,
    sha256_json,
)
from memshard.trainer.config.load import dump, to_dict
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.export.huggingface import write_code
from memshard.trainer.export.safetensors import Entry, write_safetensors
from memshard.trainer.precision import DTYPES
from memshard.trainer.run_folder import CONFIG_FILE

_BLOCK_BYTES = 1 << 24
_INT8 = "int8"
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """bytes: size of the weights file. difference: largest change of a logit from the checkpoint's,
    caused by half precision or int8.
    """

    path: Path
    step: int
    bytes: int
    difference: float


def export(
    source: str | Path,
    out: str | Path,
    dtype: str = "fp32",
    tables: str | None = None,
    huggingface: bool = False,
) -> Exported:
    """Write a model as safetensors, configuration and tokenizer into a new folder.

    source: run folder, checkpoint or export. dtype: fp32, fp16 or bf16; tables: the same or int8 (a
    scale a row), by default as dtype. huggingface: add the code with which transformers loads it.
    The configuration names no path and no address. Tables of
    product keys are in slot order, i1 * keys + i2. The
    export is compared with its source, both read through memory maps, before it gets its name.
    ValueError if `out` is taken or the two disagree.
    """
    tables = tables or dtype
    if dtype not in DTYPES or tables not in (*DTYPES, _INT8):
        raise ValueError(
            f"dtype is {dtype!r} and tables {tables!r}: choose among {', '.join(DTYPES)}, and "
            f"{_INT8} for tables"
        )
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give the name of a new folder")
    stored = open_model(source)
    if huggingface and stored.recipe.model.encoder_layers:
        raise ValueError(
            "--huggingface is for language models, and this one has an encoder "
            "(model.encoder_layers): leave it out"
        )
    # Renamed at the end: what has the name `out` is complete and compared.
    with whole_folder(out) as temporary:
        digest = write_safetensors(temporary / WEIGHTS, list(_entries(stored, dtype, tables)))
        (temporary / CONFIG_FILE).write_text(dump(_published(stored.recipe)), encoding="utf-8")
        (temporary / TOKENIZER_FILE).write_bytes(stored.tokenizer.proto)
        config = _config(stored, dtype, tables, digest)
        config["memshard"]["files"] = {
            name: sha256_file(temporary / name) for name in (CONFIG_FILE, TOKENIZER_FILE)
        }
        if huggingface:
            config |= write_code(temporary, stored.recipe.model, stored.tokenizer.eos_id)
        (temporary / CONFIG_JSON).write_text(json.dumps(config, indent=2), encoding="utf-8")
        difference = _compare(stored, temporary, dtype, tables)
    return Exported(out, stored.step, (out / WEIGHTS).stat().st_size, difference)


def _entries(stored: StoredModel, dtype: str, tables: str) -> Iterator[Entry]:
    for name, read in sorted(stored.dense.items()):
        values = read()
        narrow = DTYPES[dtype] if values.is_floating_point() else values.dtype
        yield Entry(PREFIX + name, narrow, tuple(values.shape), _dense(read, narrow))
    with torch.device("meta"):
        model = build_model(stored.recipe.model)
    for name, table in find_tables(model):
        blocks = _in_slot_order(stored, name, table)
        if tables == _INT8:
            scales: list[Tensor] = []
            yield Entry(
                f"{PREFIX}{name}.weight",
                torch.int8,
                (table.slots, table.dim),
                _quantised(blocks, scales),
            )
            # After the table: its list of scales is filled while the table is written.
            yield Entry(f"{PREFIX}{name}.{SCALE}", torch.float32, (table.slots,), scales)
        else:
            narrow = DTYPES[tables]
            yield Entry(
                f"{PREFIX}{name}.weight",
                narrow,
                (table.slots, table.dim),
                (block.to(narrow) for block in blocks),
            )


def _dense(read: Any, dtype: torch.dtype) -> Iterator[Tensor]:
    yield read().to(dtype)


def _in_slot_order(stored: StoredModel, name: str, table: ValueTable) -> Iterator[Tensor]:
    # 16 MB at a time, whatever the size of the table.
    step = max(1, _BLOCK_BYTES // (4 * table.dim))
    for first in range(0, table.slots, step):
        slots = torch.arange(first, min(first + step, table.slots))
        yield stored.tables[name](
            slots
            if table.keys is None
            else slot_rows(slots // table.keys, slots % table.keys, table.keys)
        )


def _quantised(blocks: Iterator[Tensor], scales: list[Tensor]) -> Iterator[Tensor]:
    """Iterate over the blocks in int8, and append their scales, one for each row, to `scales`."""
    for block in blocks:
        values, scale = quantise(block)
        scales.append(scale)
        yield values


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows as int8 [n, dim] and scales [n] fp32; the largest value of a row is 127."""
    values = values.float()
    scale = values.abs().amax(1) / 127
    # A row of zeros has scale 0: the smallest normal number keeps 0 / 0 from becoming NaN.
    return (values / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(
        torch.int8
    ), scale


def _published(recipe: Recipe) -> Recipe:
    """Return the recipe without what tells of the machine it ran on: paths, and addresses, which
    may hold passwords.
    """
    return replace(
        recipe,
        data=replace(recipe.data, path="", mixture={}),
        init_from=None,
        train=replace(recipe.train, wandb=None),
    )


def _config(stored: StoredModel, dtype: str, tables: str, digest: str) -> dict[str, Any]:
    model, settings = stored.recipe.model, to_dict(stored.recipe)["model"]
    return {
        "model_type": "memshard",
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.mixer.heads,
        "max_position_embeddings": model.max_length,
        "model": settings,
        "memshard": {
            "step": stored.step,
            "tables": tables,
            "sha256": digest,
            "model_sha256": sha256_json(settings),
        },
    }


def _compare(stored: StoredModel, folder: Path, dtype: str, tables: str) -> float:
    """Return the largest difference of a logit between source and export. ValueError if it is not
    what rounding the source's weights alone causes.
    """
    source, exported = load_opened(stored, memmap=True), load_model(folder, memmap=True)
    length = min(64, stored.recipe.model.max_length or 64)
    tokens = torch.randint(
        stored.recipe.model.vocab_size or 1,
        (2, length),
        generator=torch.Generator().manual_seed(fold(stored.step)),
    )
    # Rounding changes logits by an amount that no bound knows. So the source's weights are rounded
    # in the same way: then source and export must agree to the order of sums.
    before, after = _logits(source, tokens), _logits(exported, tokens)
    _round(source, stored, dtype, tables)
    rounded = _logits(source, tokens)
    wrong = float((after - rounded).abs().max())
    if not wrong <= _TOLERANCE * float(rounded.abs().max()):
        raise ValueError(
            f"{folder} disagrees with {stored.folder} by {wrong:.3g} in a logit: this is a fault "
            "of the export, please report it"
        )
    return float((after - before).abs().max())


@torch.no_grad()
def _logits(loaded: LoadedModel, tokens: Tensor) -> Tensor:
    source = {"source": (tokens, Context.of(tokens))} if loaded.recipe.model.translates else {}
    logits: Tensor = loaded.model(tokens, **source)[0]
    return logits.float()


def _round(source: LoadedModel, stored: StoredModel, dtype: str, tables: str) -> None:
    for tensor in (*source.model.parameters(), *source.model.buffers()):
        tensor.data.copy_(tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor)
    for name, table in find_tables(source.model):
        assert hasattr(table, "read_rows")
        # Rounded as they are read: the mapped table is never in memory as a whole.
        table.read_rows = _rounded(stored, name, tables)


def _rounded(stored: StoredModel, name: str, tables: str) -> Any:
    def fetch(rows: Tensor) -> Tensor:
        values = stored.tables[name](rows)
        if tables != _INT8:
            return values.to(DTYPES[tables])
        whole, scale = quantise(values)
        return whole.float() * scale[:, None]

    return fetch
