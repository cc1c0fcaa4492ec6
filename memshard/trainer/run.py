"""One training run: every piece the loop needs, its progress, and how it is saved, resumed and
rewound.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.format.remote import local_copy
from memshard.data_pipeline.stream.batch import Batch
from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.open_stream import AnyStream
from memshard.data_pipeline.stream.prefetch import prefetched
from memshard.data_pipeline.stream.rank_share import rank_share
from memshard.data_pipeline.stream.records import HeldOutRecords
from memshard.data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer
from memshard.models.memory.key_use import KeyUse
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.query_norm import QueryNorm
from memshard.models.memory.table import find_tables
from memshard.models.transformer import Transformer
from memshard.parallel.checksum import check_copies
from memshard.parallel.collectives import broadcast_from_rank0
from memshard.parallel.spec import ShardSpec
from memshard.trainer.carried_states import Carried
from memshard.trainer.checkpoint.background import BackgroundSave
from memshard.trainer.checkpoint.folders import (
    checkpoint_folder,
    committed,
    find_checkpoints,
    prune,
    remove,
    set_aside,
)
from memshard.trainer.checkpoint.global_tensors import model_tensors, optimizer_tensors
from memshard.trainer.checkpoint.init_from import init_from
from memshard.trainer.checkpoint.save_load import (
    DamagedCheckpoint,
    load_state_together,
    load_tensors,
)
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.engine.native import NativeEngine
from memshard.trainer.optim.rows.adam import RowAdam
from memshard.trainer.precision import LossScale
from memshard.trainer.run_folder import CHECKPOINTS, CONFIG_FILE
from memshard.trainer.tasks.build import Task

if TYPE_CHECKING:
    from memshard.trainer.engine.deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What changes from step to step, besides tensors. step: finished; skipped: steps without
    update; in_a_row: the latest of them.

    losses: of the last updates, at most guards.window. spikes, rewinds: how often. left_out:
    batches that rewinds have passed over. rewound_to: the step of the checkpoint that the last one
    took.
    """

    step: int = 0
    skipped: int = 0
    in_a_row: int = 0
    losses: list[float] = field(default_factory=list)
    spikes: int = 0
    rewinds: int = 0
    left_out: int = 0
    rewound_to: int | None = None

    @property
    def batch(self) -> int:
        """Number of the next batch."""
        return self.step + self.left_out


_STEP_PHASES = ("reading data", "forward and backward", "agreeing on a verdict", "updating")
PHASES = ("starting", *_STEP_PHASES, "evaluating", "saving", "done", "stopped")
"""What a rank is doing, in the order of a step."""


@dataclass
class Run:
    """A run ready to go on from `progress`. `rows` is None for a model without memory, `carried`
    unless states go on from step to step.
    """

    recipe: Recipe
    folder: Path
    device: torch.device
    dtype: torch.dtype
    rank: int
    ranks: int
    mesh: DeviceMesh | None
    model: Transformer
    placement: dict[str, ShardSpec]
    engine: "NativeEngine | DeepSpeedEngine"
    rows: RowAdam | None
    loss_scale: LossScale
    task: Task
    stream: AnyStream
    held_out: HeldOutStream | HeldOutRecords
    carried: Carried | None = None
    saving: BackgroundSave = field(default_factory=BackgroundSave)
    progress: Progress = field(default_factory=Progress)
    phase: str = PHASES[0]
    _ahead: Iterator[list[Batch]] | None = None

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step; to be called once a step."""
        settings, batch, workers = self.recipe.train, self.progress.batch, self.recipe.data.workers
        if not workers:
            return rank_share(
                self.stream,
                batch,
                settings.batch,
                self.data_rank,
                self.data_ranks,
                settings.micro_batch,
            )
        if self._ahead is None:
            share = settings.batch, self.data_rank, self.data_ranks, settings.micro_batch
            self._ahead = prefetched(
                self.stream, batch, settings.steps + self.progress.left_out, *share, workers
            )
        return next(self._ahead)

    @property
    def data_rank(self) -> int:
        """Which share of a batch this rank trains on; ranks that share the dense matrices have the
        same.
        """
        return self.rank // self.recipe.parallel.tensor

    @property
    def data_ranks(self) -> int:
        """How many shares a batch has."""
        return self.ranks // self.recipe.parallel.tensor

    @property
    def query_norms(self) -> list[QueryNorm]:
        """The memories' query norms."""
        return [memory.query_norm for _, memory in self.model.memories()]

    @property
    def watched(self) -> list[tuple[ProductKeyMemory, KeyUse]]:
        """The memories whose key use is watched, all or none, and who watches them."""
        return [
            (memory, memory.key_use)
            for _, memory in self.model.memories()
            if memory.key_use is not None
        ]

    def save(self, wait: bool = True) -> Path:
        """Write a checkpoint of the finished step, if there is none yet; returns its folder. All
        ranks take part.

        wait: until it is committed; otherwise until training may go on, and the next save, or the
        one that waits, raises what went wrong with this one.
        """
        self.phase = "saving"
        self.saving.wait()
        root = self.folder / CHECKPOINTS
        folder = checkpoint_folder(root, self.progress.step)
        # One rank looks: on a slow shared file system the others may not see the same folders yet.
        if broadcast_from_rank0(folder not in committed(root)):
            files = [self.folder / CONFIG_FILE]
            if load_index(self.recipe.data.path).kind != "images":
                files.append(local_copy(self.recipe.data.path, TOKENIZER_FILE))
            settings, tensors = self.recipe.train, self.tensors()
            # Tables are too large for a second copy, so they are written before training goes on.
            tables = tuple(f".{name}.weight" for name, _ in find_tables(self.model))
            in_place = [name for name in tensors if name.endswith(tables)] if tables else []
            self.saving.start(
                folder,
                tensors,
                self._state(),
                files,
                in_place,
                lambda: prune(root, settings.keep, settings.keep_every),
            )
        if wait:
            self.saving.wait()
        return folder

    def resume(self) -> None:
        """Continue from the newest committed checkpoint; from one before it, with a warning, if
        that is damaged. If there is none, begin with the recipe's `init_from`.

        ValueError if the data has changed since, if all are damaged, or if what the run is to begin
        with does not fit.
        """
        damaged: dict[Path, DamagedCheckpoint] = {}
        found = broadcast_from_rank0(committed(self.folder / CHECKPOINTS))
        for folder in reversed(found):
            try:
                self._load(folder)
                break
            except DamagedCheckpoint as error:
                damaged[folder] = error
        if found and len(damaged) == len(found):
            raise damaged[found[-1]]
        if self.rank == 0:
            for folder, problem in damaged.items():
                log.warning(
                    "%s is damaged (%s): the run goes on from step %d",
                    set_aside(folder),
                    problem.reason,
                    self.progress.step,
                )
        if not found and self.recipe.init_from is not None:
            self._begin_with(broadcast_from_rank0(find_checkpoints(Path(self.recipe.init_from))[0]))

    def _begin_with(self, checkpoint: Path) -> None:
        """Take over what another run has learned."""
        tokenizer, data = checkpoint / TOKENIZER_FILE, self.recipe.data.path
        if tokenizer.exists() and Tokenizer(tokenizer).sha256 != load_index(data).tokenizer_sha256:
            raise ValueError(
                f"{data} was built with another tokenizer than {checkpoint}: its tokens mean "
                "nothing to that model"
            )
        learned = self.engine.state(self._learned(), everywhere=True)
        init_from(checkpoint, self.model, learned, self.rows)
        self.engine.restore(learned)

    def rewind(self) -> None:
        """Back to the newest checkpoint, on with the data after the last batch. All ranks call it.

        Where the last rewind went to that checkpoint too, the one before it is taken. RuntimeError
        if guards.rewinds are used up.
        """
        guards, left = self.recipe.guards, self.progress
        if left.rewinds >= guards.rewinds:
            raise RuntimeError(
                f"the loss spiked again at step {left.step} after {left.rewinds} rewinds "
                "(guards.rewinds): "
                "begin another run (init_from) at an earlier checkpoint, with a lower "
                "optimizer.lr or tables.lr, or look at the data there"
            )
        self.saving.wait()
        root = self.folder / CHECKPOINTS
        # One rank looks, as in `save`.
        self._load(broadcast_from_rank0(self._rewind_target(root) if self.rank == 0 else None))
        self.progress = replace(
            self.progress,
            spikes=left.spikes,
            rewinds=left.rewinds + 1,
            left_out=left.batch - self.progress.step,
            rewound_to=self.progress.step,
        )
        self._ahead = None

    def _rewind_target(self, root: Path) -> Path:
        """The checkpoint to go back to; removes a later one, which is not of the branch that is to
        be. For rank 0.
        """
        found = committed(root)
        if len(found) > 1 and found[-1] == checkpoint_folder(root, self.progress.rewound_to or 0):
            remove(found.pop())
        return found[-1]

    def _load(self, folder: Path) -> None:
        state = load_state_together(folder)
        if state["stream"] != self.stream.fingerprint:
            raise ValueError(
                f"{self.recipe.data.path} is not the data that {folder} was trained on: "
                "give the original folder as data.path, or another --run folder"
            )
        tensors = self.tensors()
        load_tensors(folder, tensors)
        self.engine.restore(tensors)
        self.progress = Progress(**state["progress"])
        self.loss_scale.restore(state["loss_scale"])
        for name, table in find_tables(self.model):
            assert self.rows is not None
            self.rows.state[table.anchor]["step"] = state["table_steps"][name]

    def check_copies(self) -> None:
        """RuntimeError if weights that should be the same on several ranks are not."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        tensors |= {f"{name}.weight": table.weight for name, table in find_tables(self.model)}
        check_copies(tensors, self.placement, self.mesh)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint keeps as tensors, by name. They share memory with the run,
        but for what `engine.restore` takes back; all ranks call it.
        """
        tensors = self.engine.state(self._learned())
        for layer, memory in self.model.memories():
            if memory.key_use is not None:
                tensors[f"key_share.blocks.{layer}.memory"] = memory.key_use.share
                tensors[f"key_last_read.blocks.{layer}.memory"] = memory.key_use.last_read
        return tensors if self.carried is None else tensors | self.carried.tensors(self.mesh)

    def _learned(self) -> dict[str, torch.Tensor]:
        """Weights, and what the optimizers keep for them."""
        dense = self.engine.optimizer
        return model_tensors(self.model, self.placement, self.mesh) | optimizer_tensors(
            self.model, dense, self.rows, self.placement, self.mesh
        )

    def _state(self) -> dict[str, Any]:
        steps = (
            {name: self.rows.state[table.anchor]["step"] for name, table in find_tables(self.model)}
            if self.rows
            else {}
        )
        return {
            "progress": vars(self.progress),
            "loss_scale": self.loss_scale.state(),
            "table_steps": steps,
            "stream": self.stream.fingerprint,
        }
