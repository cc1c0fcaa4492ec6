"""Write a model's n-gram memories in a public format, and read them from it."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memshard.io import whole_folder
from memshard.models.ngram.memory import NgramMemory
from memshard.models.transformer import Transformer
from memshard.trainer.checkpoint.load_model import load_model, load_opened, open_model
from memshard.trainer.checkpoint.open_checkpoint import CONFIG_JSON, WEIGHTS, StoredModel
from memshard.trainer.export.bring_back import write_checkpoint
from memshard.trainer.export.ngram_formats import SHARDS, Format, Part, format_of
from memshard.trainer.export.safetensors import Entry, write_safetensors

_BLOCK_ROWS = 1 << 14
_BUFFERS = "addresses."


def export_ngrams(source: str | Path, out: Path) -> int:
    """Write the n-gram memories of a model into a new folder, in the public format of their rule:
    model.safetensors, and a config.json with the settings under the other code's names. Return the
    number of bytes of the first.

    source: run folder, checkpoint or export. ValueError for memories that no other code computes,
    or if `out` is taken.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give the name of a new folder")
    stored = open_model(source)
    form = format_of(stored.recipe.model)
    # Mapped, so that no table is in memory.
    memories = dict(load_opened(stored, memmap=True).model.ngrams())
    entries = [
        entry
        for layer, memory in memories.items()
        for entry in _entries(stored, form, layer, memory)
    ]
    config = form.config(stored.recipe.model, memories)
    with whole_folder(out) as temporary:
        write_safetensors(temporary / WEIGHTS, entries)
        (temporary / CONFIG_JSON).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return (out / WEIGHTS).stat().st_size


def import_ngrams(source: Path, into: str | Path, out: Path) -> int:
    """Write a checkpoint of a model with the n-gram memories of a safetensors file in the place of
    its own; return its step.

    into: run folder, checkpoint or export of the model, whose settings say what weights do not
    show. ValueError, with the reason, if the two do not fit.
    """
    loaded = load_model(into)
    form = format_of(loaded.recipe.model)
    if not source.is_file():
        raise ValueError(f"{source} is no file: give a safetensors file of n-gram memories")
    try:
        with safe_open(source, "pt") as file, torch.no_grad():
            _fill_all(f"{source}", file, form, loaded.model)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    return write_checkpoint(loaded, out)


def _entries(stored: StoredModel, form: Format, layer: int, memory: NgramMemory) -> Iterator[Entry]:
    prefix, ours = form.prefix.format(layer), f"blocks.{layer}.ngram."
    for part in form.parts:
        value = part.there(memory, stored.dense[ours + part.ours]())
        yield Entry(prefix + part.theirs, value.dtype, tuple(value.shape), [value])
    for name in form.zeros:
        yield Entry(prefix + name, torch.float32, (memory.dim,), [torch.zeros(memory.dim)])
    table, shards = memory.values, SHARDS if "{}" in form.table else 1
    rows = table.slots // shards
    for shard in range(shards):
        blocks = _blocks(stored.tables[f"{ours}values"], range(shard * rows, (shard + 1) * rows))
        name = prefix + form.table.format(shard)
        yield Entry(name, stored.table_dtype, (rows, table.dim), blocks)


def _blocks(read: Callable[[Tensor], Tensor], rows: range) -> Iterator[Tensor]:
    for first in range(rows.start, rows.stop, _BLOCK_ROWS):
        yield read(torch.arange(first, min(first + _BLOCK_ROWS, rows.stop)))


def _fill_all(what: str, file: Any, form: Format, model: Transformer) -> None:
    # Such as "ple": whatever is before "layers" depends on the model around it.
    kind = form.prefix.rstrip(".").rpartition(".")[2]
    layers: dict[int, dict[str, str]] = {}
    for name in file.keys():  # noqa: SIM118
        if match := re.fullmatch(rf"(?:.*\.)?layers\.(\d+)\.{kind}\.(.+)", name):
            layers.setdefault(int(match[1]), {})[match[2]] = name
    memories = dict(model.ngrams())
    if layers.keys() != memories.keys():
        raise ValueError(
            f"{what} has memories {form.prefix.format('N')}... in layers {sorted(layers)}, and the "
            f"model in layers {sorted(memories)}: set model.ngram.layers to match"
        )
    for layer, memory in memories.items():
        _fill(f"{what}: layer {layer}", file, form, layers[layer], memory)


def _fill(what: str, file: Any, form: Format, names: dict[str, str], memory: NgramMemory) -> None:
    """Copy a layer's tensors. names: of them in the file, by the name behind the prefix."""
    shards = _shards(names, form.table)
    expected = {part.theirs for part in form.parts} | {*shards}
    if missing := sorted(expected - names.keys()):
        raise ValueError(f"{what} has no {missing[0]}")
    if unknown := sorted(names.keys() - expected - {*form.zeros}):
        raise ValueError(
            f"{what} has {unknown[0]}, which ours lacks (ours have one residual stream)"
        )
    for zero in form.zeros:
        if zero in names and file.get_tensor(names[zero]).any():
            raise ValueError(f"{what} has {zero} that is not 0, and ours have no biases")
    ours = memory.state_dict()
    for part in form.parts:
        _fill_part(what, part, file.get_tensor(names[part.theirs]), ours[part.ours], memory)
    _fill_table(what, [file.get_slice(names[shard]) for shard in shards], memory)


def _fill_part(what: str, part: Part, theirs: Tensor, ours: Tensor, memory: NgramMemory) -> None:
    expected = part.there(memory, ours)
    if theirs.shape != expected.shape:
        raise ValueError(
            f"{what} has {part.theirs} of shape {list(theirs.shape)}, and the model of "
            f"{list(expected.shape)} (ours have one residual stream)"
        )
    if not part.ours.startswith(_BUFFERS):
        ours.copy_(part.back(memory, theirs))
    elif not torch.equal(theirs, expected):
        raise ValueError(
            f"{what} has {part.theirs} {theirs.tolist()}, and the model {expected.tolist()}: set "
            "model.ngram.rows, order, heads, seed, layers and token_ids to match"
        )


def _shards(names: dict[str, str], table: str) -> list[str]:
    """Return the names of a table's shards, in order."""
    if "{}" not in table:
        return [table]
    pattern = r"(\d+)".join(re.escape(piece) for piece in table.split("{}"))
    found = [re.fullmatch(pattern, name) for name in names]
    numbers = {int(match[1]) for match in found if match}
    # All up to the last, so that one that is not there is missed.
    return [table.format(number) for number in range(max(numbers, default=0) + 1)]


def _fill_table(what: str, shards: list[Any], memory: NgramMemory) -> None:
    table = memory.values
    shape = [sum(shard.get_shape()[0] for shard in shards), shards[0].get_shape()[1]]
    if shape != [table.slots, table.dim]:
        raise ValueError(
            f"{what} has a table of {shape[0]:,} rows x {shape[1]}, and the model one of "
            f"{table.slots:,} x {table.dim}: set model.ngram.rows, order, heads and value_dim to "
            "match"
        )
    first = 0
    for shard in shards:
        for start in range(0, shard.get_shape()[0], _BLOCK_ROWS):
            rows = shard[start : start + _BLOCK_ROWS]
            table.weight[first : first + len(rows)] = rows
            first += len(rows)
