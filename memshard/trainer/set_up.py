"""Builds a run from its recipe."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.stream.open_stream import open_held_out, open_train
from memshard.data_pipeline.stream.train_stream import TrainStream
from memshard.models.config import ModelConfig
from memshard.models.initialize import initialize
from memshard.models.memory.key_use import KeyUse
from memshard.models.memory.table import ValueTable, find_tables
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.seq2seq import build_model
from memshard.models.transformer import Transformer
from memshard.parallel.apply import apply, losses_on
from memshard.parallel.collectives import all_sum
from memshard.parallel.mesh import build_mesh
from memshard.parallel.spec import ShardSpec
from memshard.trainer.carried_states import Carried
from memshard.trainer.compile import compile_layers
from memshard.trainer.config.optimizers import TableOptimizerConfig
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.estimate import check_fits
from memshard.trainer.cost.layout_choice import layout_choice
from memshard.trainer.engine.native import NativeEngine
from memshard.trainer.optim.rows.adam import RowAdam
from memshard.trainer.precision import LossScale, compute_dtype, store_tables
from memshard.trainer.run import Run
from memshard.trainer.run_folder import check_identity, write_config
from memshard.trainer.tasks.build import build_task
from memshard.trainer.watch.weights_and_biases import check_installed

if TYPE_CHECKING:
    from memshard.trainer.engine.deepspeed import DeepSpeedEngine


def set_up(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    build: Callable[[ModelConfig], Transformer] = build_model,
) -> Run:
    """Build the run and resume it where its folder holds a checkpoint. All ranks call it with the
    same recipe.

    build: makes the model; one that puts other layers in serves comparisons. ValueError or
    FileNotFoundError for whatever is the user's to mend; nothing is written to the folder before
    all is well.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    recipe = resolve(recipe)
    assert recipe.model.vocab_size is not None
    check_identity(folder, recipe)
    if recipe.train.wandb:
        check_installed()
    data = recipe.data
    by_epochs = data.mixture_by == "epochs"
    stream = open_train(
        data.path,
        data.length,
        recipe.train.batch,
        recipe.train.seed,
        data.damage_tolerance,
        data.mixture,
        by_epochs,
    )
    if recipe.train.carry_state and not isinstance(stream, TrainStream):
        raise ValueError(
            f"train.carry_state needs text that goes on from step to step, and {data.path} holds "
            "whole records: leave it out"
        )
    # One text is read in pieces as large as a micro-batch.
    rows = (
        (recipe.train.micro_batch or -(-recipe.train.batch * recipe.parallel.tensor // ranks))
        if recipe.train.carry_state
        else 1
    )
    held_out = open_held_out(recipe.data.path, rows * recipe.data.length, recipe.train.eval_tokens)
    check_fits(recipe, ranks, recipe.model.vocab_size, device)

    mesh = build_mesh(device.type, recipe.parallel.memory, recipe.parallel.tensor)
    layout = layout_choice(recipe, ranks)
    with torch.device("meta"):
        model = build(recipe.model)
    placement = apply(model, mesh, layout.name, recipe.parallel.share)
    store_tables(model, recipe.tables.dtype)
    for _, table in find_tables(model):
        table.host = recipe.tables.place == "host"
    model.to_empty(device=device)
    initialize(model, recipe.train.seed)
    train = recipe.train
    model.configure(
        Recompute(train.checkpointing, train.chunk, train.segments, train.check_inversion),
        train.label_smoothing,
    )
    for _, memory in model.memories():
        memory.query_norm.deferred = True
        if recipe.tables.revive or recipe.train.key_balance:
            memory.key_use = KeyUse(memory.heads, recipe.model.memory.keys, device, all_sum)
    if recipe.train.compile:
        compile_layers(model)
    tables = [table for _, table in find_tables(model)]
    dtype = compute_dtype(recipe.train.precision, device)
    run = Run(
        recipe=recipe,
        folder=folder,
        device=device,
        dtype=dtype,
        rank=rank,
        ranks=ranks,
        mesh=mesh,
        model=model,
        placement=placement,
        engine=_engine(recipe, model, mesh, placement, dtype),
        rows=_row_adam(tables, recipe.tables) if tables else None,
        loss_scale=LossScale(recipe.train.loss_scale, dtype),
        task=build_task(recipe, device, losses_on(mesh, recipe.parallel.share)),
        stream=stream,
        held_out=held_out,
    )
    if recipe.train.carry_state:
        assert isinstance(stream, TrainStream)
        run.carried = Carried(model, stream.lanes, stream.continues, run.data_rank, run.data_ranks)
    run.resume()
    run.check_copies()
    if rank == 0:
        write_config(folder, recipe)
        run.engine.write_settings(folder)
    return run


def _engine(
    recipe: Recipe,
    model: Transformer,
    mesh: DeviceMesh | None,
    placement: dict[str, ShardSpec],
    dtype: torch.dtype,
) -> "NativeEngine | DeepSpeedEngine":
    if recipe.train.engine == "torch":
        return NativeEngine(
            model, recipe.optimizer, mesh, placement, shard_states=recipe.train.zero > 0
        )
    from memshard.trainer.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, recipe.optimizer, recipe.train, mesh, placement, dtype)


def _row_adam(tables: list[ValueTable], config: TableOptimizerConfig) -> RowAdam:
    return RowAdam(
        tables, config.lr, config.betas, config.eps, config.semantics, config.rounding, config.clip
    )


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with what its data decides filled in: vocabulary size and longest sequence."""
    vocabulary = load_index(recipe.data.path).vocab_size
    model = recipe.model
    if model.vocab_size is not None and model.vocab_size < vocabulary:
        raise ValueError(
            f"model.vocab_size is {model.vocab_size} but the tokenizer of {recipe.data.path} has "
            f"{vocabulary} tokens: "
            f"leave model.vocab_size out, or set at least {vocabulary}"
        )
    if model.longest(recipe.data.length) < recipe.data.length:
        key = "model.max_length" if model.max_length else "model.axial"
        raise ValueError(
            f"{key} holds {model.longest(0)} positions but data.length is {recipe.data.length}: "
            "raise it or leave it out"
        )
    model = replace(
        model,
        vocab_size=model.vocab_size or vocabulary,
        max_length=model.longest(recipe.data.length),
    )
    return replace(recipe, model=model)
