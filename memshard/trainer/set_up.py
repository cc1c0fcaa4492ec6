"""Build a run from its recipe, and resume it."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.format.remote import local_copy
from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.open_stream import (
    AnyStream,
    open_held_out,
    open_train,
    resolve_order,
)
from memshard.data_pipeline.stream.records import HeldOutRecords
from memshard.data_pipeline.stream.train_stream import TrainStream
from memshard.data_pipeline.tokenizer import TOKENIZER_FILE
from memshard.models.config import ModelConfig
from memshard.models.memory.key_use import KeyUse
from memshard.models.seq2seq import build_model
from memshard.models.transformer import Transformer
from memshard.parallel.apply import losses_on
from memshard.parallel.collectives import all_sum
from memshard.parallel.mesh import build_mesh
from memshard.trainer.carried_states import Carried
from memshard.trainer.config.load import dump
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.estimate import check_fits
from memshard.trainer.cost.layout_choice import layout_choices
from memshard.trainer.ngram_tokens import map_tokens, resolve_ngrams
from memshard.trainer.resume import resume
from memshard.trainer.run import Run
from memshard.trainer.run_folder import CONFIG_FILE, check_identity, write_config
from memshard.trainer.tasks.build import build_task
from memshard.trainer.training import Training, build_for_training
from memshard.trainer.watch.weights_and_biases import check_installed


def set_up(
    recipe: Recipe,
    folder: Path | str,
    device: torch.device | str,
    build: Callable[[ModelConfig], Transformer] = build_model,
) -> Run:
    """Build the run and resume it where its folder has a checkpoint. All ranks call it with the
    same recipe.

    build: makes the model; another function puts other layers in, for comparisons. ValueError or
    FileNotFoundError for whatever the user has to mend; nothing is written to the folder before
    all is well.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    folder, device = Path(folder), torch.device(device)
    recipe = resolve(recipe)
    check_identity(folder, recipe)
    # Now, not at the first log: a missing package would end the run after the set-up.
    if recipe.train.wandb:
        check_installed()
    stream, held_out = open_data(recipe, ranks)
    assert recipe.model.vocab_size is not None
    # Before anything is allocated: a process killed for memory says nothing.
    check_fits(recipe, ranks, recipe.model.vocab_size, device)
    training = build_training(recipe, ranks, device, build)
    run = build_run(recipe, folder, training, stream, held_out, rank, ranks)
    resume(run)
    # Ranks that began with different weights would train apart without an error.
    run.check_copies()
    # Last, so that a recipe with a mistake leaves no run folder to resume.
    if rank == 0:
        write_config(folder, recipe)
        run.engine.write_settings(folder)
    return run


def open_data(recipe: Recipe, ranks: int) -> tuple[AnyStream, HeldOutStream | HeldOutRecords]:
    """Return the training stream and the held-out data. ValueError if one does not fit."""
    data, train = recipe.data, recipe.train
    by_epochs = data.mixture_by == "epochs"
    stream = open_train(
        data.path,
        data.length,
        train.batch,
        train.seed,
        data.damage_tolerance,
        data.mixture,
        by_epochs,
        data.order,
    )
    rows = 1
    if train.carry_state:
        if not isinstance(stream, TrainStream):
            raise ValueError(
                f"train.carry_state needs text that goes on from step to step, and {data.path} "
                "holds whole records: leave it out"
            )
        # The held-out text is read as one, in windows as long as a micro-batch has tokens.
        rows = train.micro_batch or -(-train.batch * recipe.parallel.tensor // ranks)
    return stream, open_held_out(data.path, rows * data.length, train.eval_tokens)


def build_training(
    recipe: Recipe, ranks: int, device: torch.device, build: Callable[[ModelConfig], Transformer]
) -> Training:
    """Build the model and its optimizers as the recipe says, spread over all ranks."""
    mesh = build_mesh(device.type, recipe.parallel.memory, recipe.parallel.tensor)
    choices = layout_choices(recipe, recipe.model.table_groups, ranks)
    # Built without memory; each rank then allocates and draws its part only.
    with torch.device("meta"):
        model = build(recipe.model)
    training = build_for_training(
        model,
        recipe.optimizer,
        recipe.tables,
        recipe.train,
        device=device,
        mesh=mesh,
        layout={section: choice.name for section, choice in choices.items()},
        share=recipe.parallel.share,
    )
    if model.window is not None and model.window.token_map is not None:
        model.window.set_token_map(map_tokens(recipe.model, recipe.data.path)[0])
    if recipe.tables.revive or recipe.train.key_balance:
        for _, memory in model.memories():
            memory.key_use = KeyUse(memory.heads, recipe.model.memory.keys, device, all_sum)
    return training


def build_run(
    recipe: Recipe,
    folder: Path,
    training: Training,
    stream: AnyStream,
    held_out: HeldOutStream | HeldOutRecords,
    rank: int,
    ranks: int,
) -> Run:
    """Return the run at its first step."""
    run = Run(
        **vars(training),
        recipe=recipe,
        folder=folder,
        rank=rank,
        ranks=ranks,
        task=build_task(recipe, training.device, losses_on(training.mesh, recipe.parallel.share)),
        stream=stream,
        held_out=held_out,
        files=_kept_files(recipe),
    )
    if recipe.train.carry_state:
        assert isinstance(stream, TrainStream)
        run.carried_states = Carried(
            run.model,
            stream.text_lanes,
            stream.continues,
            run.data_rank,
            run.data_ranks,
            recipe.train.micro_batch,
        )
    return run


def _kept_files(recipe: Recipe) -> dict[str, bytes]:
    """Return recipe and tokenizer as checkpoints keep them, read now so that no save needs the data
    folder. ValueError if the tokenizer is not the one that the data set was built with.
    """
    files = {CONFIG_FILE: dump(recipe).encode()}
    path, index = recipe.data.path, load_index(recipe.data.path)
    if index.records.tokenizer:
        content = local_copy(path, TOKENIZER_FILE, index.tokenizer_sha256).read_bytes()
        if hashlib.sha256(content).hexdigest() != index.tokenizer_sha256:
            raise ValueError(
                f"{path}/{TOKENIZER_FILE} is not the tokenizer that the data set was built with: "
                "copy it again"
            )
        files[TOKENIZER_FILE] = content
    return files


def resolve(recipe: Recipe) -> Recipe:
    """Return the recipe with what its data decides filled in: vocabulary size, longest sequence,
    buckets of LSH, order of sequences, ids of n-grams.
    """
    if not recipe.data.path:
        raise ValueError("data.path is empty, as in exports: give data.path=DIR")
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
    model = replace(model, vocab_size=model.vocab_size or vocabulary)
    model = resolve_ngrams(model, recipe.data.path)
    data = recipe.data
    order = resolve_order(data.path, data.order, data.mixture, recipe.train.carry_state)
    return replace(recipe, model=model.for_length(data.length), data=replace(data, order=order))
