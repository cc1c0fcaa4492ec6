"""One training run, set up: every piece the loop needs, built from a recipe."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.format.remote import local_copy
from memshard.data_pipeline.stream.batch import Batch
from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.open import AnyStream, open_held_out, open_train
from memshard.data_pipeline.stream.prefetch import prefetched
from memshard.data_pipeline.stream.records import HeldOutRecords
from memshard.data_pipeline.stream.share import rank_share
from memshard.data_pipeline.tokenizer import TOKENIZER_FILE
from memshard.models.initialize import initialize
from memshard.models.memory.query_norm import QueryNorm
from memshard.models.memory.table import ValueTable, find_tables
from memshard.models.transformer import Transformer
from memshard.parallel.apply import apply
from memshard.parallel.collectives import from_first
from memshard.parallel.mesh import build_mesh
from memshard.parallel.spec import ShardSpec
from memshard.trainer.checkpoint.folders import checkpoint_folder, committed, prune
from memshard.trainer.checkpoint.store import load_state, load_tensors, save_checkpoint
from memshard.trainer.checkpoint.tensors import model_tensors, optimizer_tensors
from memshard.trainer.config.recipe import Recipe, TableOptimizerConfig
from memshard.trainer.engine.native import NativeEngine
from memshard.trainer.estimate import check_fits, layout_choice
from memshard.trainer.optim.row_adam import RowAdam
from memshard.trainer.precision import compute_dtype, store_tables
from memshard.trainer.run_folder import CHECKPOINTS, CONFIG_FILE, check_identity, write_config
from memshard.trainer.tasks.language_model import LanguageModelTask


@dataclass
class Progress:
    """What changes from step to step, besides tensors. step: finished; skipped: steps without update; in_a_row: the latest of them."""

    step: int = 0
    skipped: int = 0
    in_a_row: int = 0


@dataclass
class Run:
    """A run ready to go on from `progress`. `rows` is None for a model without memory."""

    recipe: Recipe
    folder: Path
    device: torch.device
    dtype: torch.dtype
    rank: int
    ranks: int
    mesh: DeviceMesh | None
    model: Transformer
    placement: dict[str, ShardSpec]
    engine: NativeEngine
    rows: RowAdam | None
    task: LanguageModelTask
    stream: AnyStream
    held_out: HeldOutStream | HeldOutRecords
    progress: Progress = field(default_factory=Progress)
    _ahead: Iterator[list[Batch]] | None = None

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step; to be called once a step."""
        settings, step, workers = self.recipe.train, self.progress.step, self.recipe.data.workers
        if not workers:
            return rank_share(self.stream, step, settings.batch, self.rank, self.ranks, settings.micro_batch)
        if self._ahead is None:
            share = settings.batch, self.rank, self.ranks, settings.micro_batch
            self._ahead = prefetched(self.stream, step, settings.steps, *share, workers)
        return next(self._ahead)

    @property
    def query_norms(self) -> list[QueryNorm]:
        """The memories' query norms."""
        return [memory.query_norm for _, memory in self.model.memories()]

    def save(self) -> Path:
        """Write a checkpoint of the finished step, if there is none yet; returns its folder. All ranks take part."""
        root = self.folder / CHECKPOINTS
        folder = checkpoint_folder(root, self.progress.step)
        # One rank looks: on a slow shared file system the others may not see the same folders yet.
        if from_first(folder not in committed(root)):
            files = [self.folder / CONFIG_FILE]
            if load_index(self.recipe.data.path).kind != "images":
                files.append(local_copy(self.recipe.data.path, TOKENIZER_FILE))
            save_checkpoint(folder, self._tensors(), self._state(), files)
            if self.rank == 0:
                prune(root, self.recipe.train.keep)
        return folder

    def resume(self) -> None:
        """Continue from the newest committed checkpoint, if there is one. ValueError if the data has changed since."""
        newest = from_first(next(reversed(committed(self.folder / CHECKPOINTS)), None))
        if newest is None:
            return
        state = load_state(newest)
        if state["stream"] != self.stream.fingerprint:
            raise ValueError(
                f"{self.recipe.data.path} is not the data that {newest} was trained on: "
                "give the original folder as data.path, or another --run folder"
            )
        load_tensors(newest, self._tensors())
        self.progress = Progress(**state["progress"])
        for name, table in find_tables(self.model):
            assert self.rows is not None
            self.rows.state[table.anchor]["step"] = state["table_steps"][name]

    def _tensors(self) -> dict[str, torch.Tensor]:
        dense = self.engine.optimizer
        return model_tensors(self.model, self.placement, self.mesh) | optimizer_tensors(
            self.model, dense, self.rows, self.placement, self.mesh
        )

    def _state(self) -> dict[str, Any]:
        steps = {name: self.rows.state[table.anchor]["step"] for name, table in find_tables(self.model)} if self.rows else {}
        return {"progress": vars(self.progress), "table_steps": steps, "stream": self.stream.fingerprint}


def set_up(recipe: Recipe, folder: Path, device: torch.device) -> Run:
    """Build the run and resume it where its folder holds a checkpoint. All ranks call it with the same recipe.

    ValueError or FileNotFoundError for whatever is the user's to mend; nothing is written to the folder before all is well.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    recipe = resolve(recipe)
    assert recipe.model.vocab_size is not None
    check_identity(folder, recipe)
    data = recipe.data
    by_epochs = data.mixture_by == "epochs"
    stream = open_train(data.path, data.length, recipe.train.batch, recipe.train.seed, data.damage_tolerance, data.mixture, by_epochs)
    held_out = open_held_out(recipe.data.path, recipe.data.length, recipe.train.eval_tokens)
    check_fits(recipe, ranks, recipe.model.vocab_size, device)

    mesh = build_mesh(device.type, recipe.parallel.memory)
    layout = layout_choice(recipe, ranks)
    with torch.device("meta"):
        model = Transformer(recipe.model)
    placement = apply(model, mesh, layout.layout, layout.exchange)
    store_tables(model, recipe.tables.dtype)
    model.to_empty(device=device)
    initialize(model, recipe.train.seed)
    for _, memory in model.memories():
        memory.query_norm.deferred = True
    tables = [table for _, table in find_tables(model)]
    run = Run(
        recipe=recipe,
        folder=folder,
        device=device,
        dtype=compute_dtype(recipe.train.precision, device),
        rank=rank,
        ranks=ranks,
        mesh=mesh,
        model=model,
        placement=placement,
        engine=NativeEngine(model, recipe.optimizer, mesh),
        rows=_row_adam(tables, recipe.tables) if tables else None,
        task=LanguageModelTask(device, recipe.data.document_mask, recipe.train.seed),
        stream=stream,
        held_out=held_out,
    )
    run.resume()
    if rank == 0:
        write_config(folder, recipe)
    return run


def _row_adam(tables: list[ValueTable], config: TableOptimizerConfig) -> RowAdam:
    return RowAdam(tables, config.lr, config.betas, config.eps, config.semantics, config.rounding, config.clip)


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with what its data decides filled in: vocabulary size and longest sequence."""
    vocabulary = load_index(recipe.data.path).vocab_size
    model = recipe.model
    if model.vocab_size is not None and model.vocab_size < vocabulary:
        raise ValueError(
            f"model.vocab_size is {model.vocab_size} but the tokenizer of {recipe.data.path} has {vocabulary} tokens: "
            f"leave model.vocab_size out, or set at least {vocabulary}"
        )
    if model.max_length is not None and model.max_length < recipe.data.length:
        raise ValueError(f"model.max_length is {model.max_length} but data.length is {recipe.data.length}: raise it or leave it out")
    model = replace(model, vocab_size=model.vocab_size or vocabulary, max_length=model.max_length or recipe.data.length)
    return replace(recipe, model=model)
