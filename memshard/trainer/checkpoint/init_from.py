"""Start from another run's checkpoint; memories, convolutions and keys may be added."""

from pathlib import Path

import torch
from torch import Size, Tensor

from memshard.models.layers.convolution import CausalConvolution
from memshard.models.memory.table import find_tables
from memshard.models.ngram.memory import NgramMemory
from memshard.models.transformer import Transformer
from memshard.trainer.checkpoint.grow import grow_sub_keys, grow_table, local_part
from memshard.trainer.checkpoint.save_load import (
    index_of,
    load_state_together,
    load_tensors,
    step_of,
    table_steps_of,
)
from memshard.trainer.optim.rows.adam import RowAdam


@torch.no_grad()
def init_from(
    checkpoint: Path, model: Transformer, tensors: dict[str, Tensor], rows: RowAdam | None
) -> None:
    """Fill an initialised model and its optimizers from a committed checkpoint. All ranks call it.

    tensors: of the model and its optimizers, by their names in checkpoints; moments and step counts
    are loaded as well. New parts leave the outputs as they were: values of new tables and of new
    slots are 0, new sub-keys are short, new convolutions see only the current token. A feedforward
    that a new memory replaces is dropped. ValueError, naming the parameter,
    for any other difference.
    """
    recorded = load_state_together(checkpoint)
    step_of(checkpoint, recorded)
    saved = {name: Size(stored.shape) for name, stored in index_of(checkpoint).items()}
    fresh = [
        layer
        for layer, _ in model.memories()
        if f"model.blocks.{layer}.memory.sub_keys.weight" not in saved
    ]
    ngrams = {
        f"{name}.": module
        for name, module in model.named_modules()
        if isinstance(module, NgramMemory) and f"model.{name}.addresses.moduli" not in saved
    }
    convolutions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CausalConvolution)
        and f"model.{name}.weight" not in saved
        # The convolution of a new memory changes nothing, whatever its kernels are.
        and not name.startswith(tuple(ngrams))
    }
    new = (
        *(f"blocks.{layer}.memory." for layer in fresh),
        *ngrams,
        *(f"{name}." for name in convolutions),
        *(("window.",) if ngrams and "model.window.token_map" not in saved else ()),
    )
    tables = {f"{name}.weight": table for name, table in find_tables(model)}
    steps = table_steps_of(
        checkpoint,
        recorded,
        [name.removesuffix(".weight") for name in tables if not name.startswith(new)],
    )
    old_tables = [name for name in tables if not name.startswith(new)]
    of_ngrams = {id(memory.values) for _, memory in model.ngrams()}
    _check_readers(model, fresh, [name for name in old_tables if id(tables[name]) not in of_ngrams])
    if model.config.ngram.share and 0 < len(ngrams) < len(list(model.ngrams())):
        raise ValueError(
            "model.ngram.layers adds a layer to the readers of a table that the checkpoint has "
            "trained: set model.ngram.share=false, or leave the layer out"
        )
    new_layers = [layer for layer, memory in model.ngrams() if memory in ngrams.values()]
    _check_all_used(checkpoint, model, [*fresh, *new_layers], tensors, saved)

    pairs = [
        (name, name)
        for name in tensors
        if _parameter(name) not in tables and not _parameter(name).startswith(new)
    ]
    pairs += [
        pair
        for name in tables
        if not name.startswith(new)
        for pair in _table_pairs(name, tensors, saved)
    ]
    same, grown = {}, []
    for source, target in pairs:
        if source not in saved:
            raise ValueError(
                f"{checkpoint} has no {source}: only memories and convolutions may be new with "
                "init_from"
            )
        if saved[source] == tensors[target].shape:
            same[source] = tensors[target]
        else:
            table = tables.get(_parameter(target))
            if id(table) in of_ngrams:
                raise ValueError(
                    f"{source} is {list(saved[source])} in {checkpoint} and "
                    f"{list(tensors[target].shape)} here: in a table of another size n-grams have "
                    "other rows, so set model.ngram.* as there"
                )
            _check_growth(
                checkpoint, source, saved[source], tensors[target].shape, table is not None
            )
            grown.append((source, target))
    load_tensors(checkpoint, same)
    for name, module in convolutions.items():
        kernel = local_part(tensors[f"model.{name}.weight"]).view(-1, module.width)
        # Kernel (1, 0, 0, ...) passes the current token on unchanged.
        kernel.zero_()
        kernel[:, 0] = 1
    # Only these tables become 0. PEER's other table keeps its draw: each one's gradient has the
    # other as a factor, so two tables of zeros would never leave 0.
    outputs = {id(memory.values) for _, memory in model.memories()} | of_ngrams
    for source, target in grown:
        table = tables.get(_parameter(target))
        if table is None:
            grow_sub_keys(
                checkpoint,
                source,
                saved[source],
                tensors[target],
                # Not their moments, which are 0 and have no length to scale.
                shorten=target.startswith("model."),
            )
        else:
            grow_table(
                checkpoint,
                source,
                saved[source],
                tensors[target],
                table,
                zero_new=id(table) in outputs,
            )

    for name, table in tables.items():
        assert rows is not None
        state = rows.state[table.anchor]
        if name.startswith(new):
            if id(table) in outputs:
                table.weight.zero_()
                state.get("master", table.weight).zero_()
            continue
        state["step"] = steps[name.removesuffix(".weight")]
        # The fp32 copy was loaded; the table itself is its rounding.
        if "master" in state:
            table.weight.copy_(state["master"])
        if "row_step" in state and f"row_step.{name}" not in saved:
            # The checkpoint counts no steps by row: take the table's count for each.
            state["row_step"].fill_(state["step"])


def _parameter(name: str) -> str:
    """Return the parameter that a tensor of a checkpoint belongs to."""
    # "exp_avg.blocks.0.mixer.query.weight" without its first word.
    return name.partition(".")[2]


def _table_pairs(
    name: str, tensors: dict[str, Tensor], saved: dict[str, Size]
) -> list[tuple[str, str]]:
    """Return (name in the checkpoint, name here) of the tensors to load for a table; values are
    read from and into the fp32 copy where there is one.
    """
    kinds = [
        "exp_avg",
        "exp_avg_sq",
        "last_step",
        *(["row_step"] if f"row_step.{name}" in saved else []),
    ]
    pairs = [(f"{kind}.{name}", f"{kind}.{name}") for kind in kinds if f"{kind}.{name}" in tensors]
    source, target = (
        "master" if f"master.{name}" in known else "model" for known in (saved, tensors)
    )
    return [(f"{source}.{name}", f"{target}.{name}"), *pairs]


def _check_readers(model: Transformer, fresh: list[int], old_tables: list[str]) -> None:
    """Raise ValueError if a new layer would read a trained table, which changes outputs."""
    if fresh and old_tables and model.config.memory.share:
        raise ValueError(
            f"model.memory.layers adds layer {fresh[0]} to the readers of a table that the "
            "checkpoint has trained: "
            "set model.memory.share=false, or leave the layer out"
        )


def _check_all_used(
    checkpoint: Path,
    model: Transformer,
    fresh: list[int],
    tensors: dict[str, Tensor],
    saved: dict[str, Size],
) -> None:
    replaced = tuple(
        f"model.blocks.{layer}.feedforward."
        for layer in fresh
        if model.blocks[layer].feedforward is None
    )
    for name in saved:
        if name.startswith("model.") and name not in tensors and not name.startswith(replaced):
            raise ValueError(
                f"{checkpoint} has {name}, which this model lacks: init_from only adds "
                "memories, convolutions and keys; "
                f"set model.* as there (memshard config diff {checkpoint} RECIPE)"
            )


def _check_growth(checkpoint: Path, name: str, saved: Size, here: Size, is_table: bool) -> None:
    """Raise ValueError unless only the number of keys differs, and has grown."""
    # [slots, dim], or [heads, 2, keys, half]
    keys_at = 0 if is_table else 2
    others = [[size for dim, size in enumerate(shape) if dim != keys_at] for shape in (saved, here)]
    if others[0] != others[1] or not (is_table or name.endswith(".sub_keys.weight")):
        raise ValueError(
            f"{name} is {list(saved)} in {checkpoint} and {list(here)} here: set model.* as there"
        )
    if here[keys_at] < saved[keys_at]:
        raise ValueError(
            f"{name} is {list(saved)} in {checkpoint} and {list(here)} here: tables can only "
            "grow, raise model.memory.keys"
        )
