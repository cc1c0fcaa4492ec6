"""The parts of a training run, and how far it is."""

from dataclasses import dataclass, field
from pathlib import Path

from memshard.data_pipeline.stream.batch import Batch
from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.open_stream import AnyStream
from memshard.data_pipeline.stream.prefetch import Prefetched
from memshard.data_pipeline.stream.rank_share import rank_share
from memshard.data_pipeline.stream.records import HeldOutRecords
from memshard.lock import FolderLock
from memshard.models.memory.key_use import KeyUse
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.transformer import Transformer
from memshard.trainer.carried_states import Carried
from memshard.trainer.checkpoint.background import BackgroundSave
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.outage import NO_DATA, NoData
from memshard.trainer.tasks.build import Task
from memshard.trainer.training import Training


@dataclass
class Progress:
    """The numbers that change from step to step; checkpoints keep them.

    step: finished steps. skipped: steps without an update; in_a_row: how many of the latest steps.
    losses: of the latest updates, at most guards.window. spikes, rewinds: how often they happened.
    left_out: batches that rewinds have passed over. rewound_to: the step of the checkpoint that the
    latest rewind loaded.
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


@dataclass(kw_only=True)
class Run(Training):
    """A training run, ready to continue at `progress`.

    recipe: with the vocabulary size and the longest sequence filled in. files: what checkpoints
    keep besides, by name. rank, ranks: this process
    among all. carried_states: None unless train.carry_state. lock: of the
    folder, on rank 0 of a command. saving: the checkpoint being written.
    steps_here: steps since the run was set up or last loaded a checkpoint.
    """

    model: Transformer
    recipe: Recipe
    folder: Path
    rank: int
    ranks: int
    task: Task
    stream: AnyStream
    held_out: HeldOutStream | HeldOutRecords
    files: dict[str, bytes] = field(default_factory=dict)
    carried_states: Carried | None = None
    lock: FolderLock | None = None
    saving: BackgroundSave = field(default_factory=BackgroundSave)
    progress: Progress = field(default_factory=Progress)
    steps_here: int = 0
    _prefetched: Prefetched | None = None
    _ahead: list[Batch] | NoData | None = None

    def next_batches(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step; call it once a step."""
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, NO_DATA):
            raise ahead
        return self._read(self.progress.batch) if ahead is None else ahead

    def read_ahead(self) -> None:
        """Read the micro-batches of the step after this one, if a GPU computes meanwhile. Data that
        cannot be read are an error when that step asks for them.
        """
        if self.device.type == "cuda" and self.progress.step + 1 < self.recipe.train.steps:
            self.phase = "reading data"
            try:
                self._ahead = self._read(self.progress.batch + 1)
            except NO_DATA as error:
                self._ahead = error

    def _read(self, batch: int) -> list[Batch]:
        train, workers = self.recipe.train, self.recipe.data.workers
        share = train.batch, self.data_rank, self.data_ranks, train.micro_batch
        if not workers:
            return rank_share(self.stream, batch, *share)
        # Started here and not with the run: a resumed run knows its place only now.
        if self._prefetched is None:
            # A rewind passes over batches, so the last step reads a later one.
            last = train.steps + self.progress.left_out
            self._prefetched = Prefetched(self.stream, batch, last, *share, workers)
        return next(self._prefetched)

    def continue_from(self, progress: Progress) -> None:
        """Go on from another place in the data; batches read ahead are forgotten."""
        self.progress, self.steps_here, self._ahead = progress, 0, None
        self.stop_reading()

    def stop_reading(self) -> None:
        """End the processes that read ahead, if there are any."""
        if self._prefetched is not None:
            self._prefetched.close()
            self._prefetched = None

    def owns_folder(self) -> bool:
        """Return whether no other process has taken the run's folder since, as far as is known."""
        return self.lock is None or self.lock.holds()

    @property
    def data_rank(self) -> int:
        """Which share of a batch this rank trains on; tensor-parallel ranks have the same one."""
        return self.rank // self.recipe.parallel.tensor

    @property
    def data_ranks(self) -> int:
        """Number of shares of a batch."""
        return self.ranks // self.recipe.parallel.tensor

    @property
    def watched(self) -> list[tuple[ProductKeyMemory, KeyUse]]:
        """The memories whose key use is watched (all or none), each with its record."""
        return [
            (memory, memory.key_use)
            for _, memory in self.model.memories()
            if memory.key_use is not None
        ]
