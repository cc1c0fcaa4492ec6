"""Collect what happens between two lines of metrics: losses, speed, table traffic."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from memshard.models.memory.table import ValueTable, find_tables
from memshard.parallel.collectives import all_sum
from memshard.parallel.mesh import tensor_size
from memshard.parallel.tables.sharded import ShardedTable
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.operations import flops_per_token
from memshard.trainer.cost.this_machine import peak_flops
from memshard.trainer.optim.rows.adam import RowAdam
from memshard.trainer.run import Progress
from memshard.trainer.step import RunStep
from memshard.trainer.training import Training


class Meter:
    """Sums the outcomes of steps until they are read. ranks: of the whole run."""

    def __init__(self, training: Training, recipe: Recipe, ranks: int) -> None:
        self.training, self.recipe, self.ranks = training, recipe, ranks
        self.flops = flops_per_token(recipe.model, recipe.data.length)
        self.peak = peak_flops(training.device, training.dtype) * ranks
        self.sent: dict[str, int] = {}
        self.rank_report = ""
        """Text for this rank's log: the numbers of the last reading that differ between ranks."""
        self.restart()

    def restart(self) -> None:
        """Forget the steps since the last reading."""
        self.loss = 0.0
        self.steps = self.tokens = self.masked = 0
        self.data_wait = 0.0
        self.begun = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time and traffic of an evaluation or save. A context manager."""
        begun = time.perf_counter()
        before = {name: replace(table.traffic) for name, table in self._sharded()}
        yield
        # Moving the start leaves the pause out of every figure that divides by the time since then.
        self.begun += time.perf_counter() - begun
        for name, table in self._sharded():
            table.traffic.reads, table.traffic.seconds = before[name].reads, before[name].seconds

    def _sharded(self) -> Iterator[tuple[str, ShardedTable]]:
        return (
            (name, table)
            for name, table in find_tables(self.training.model)
            if isinstance(table, ShardedTable)
        )

    def add(self, outcome: RunStep) -> None:
        """Count a step."""
        self.loss += outcome.loss
        self.steps += 1
        self.tokens += outcome.tokens
        self.masked += outcome.masked
        self.data_wait += outcome.data_wait
        self.last = outcome

    def read(self, progress: Progress) -> dict[str, float]:
        """Return the means since the last reading. All ranks call it."""
        seconds = time.perf_counter() - self.begun
        training = self.training
        tokens_per_s = self.tokens / seconds
        values = {
            "train/loss": self.loss / self.steps,
            "train/lr": self.last.rate,
            "train/grad_norm": self.last.norm,
            "train/skipped": float(progress.skipped),
            "train/spikes": float(progress.spikes),
            "train/rewinds": float(progress.rewinds),
            "train/masked": self.masked / self.tokens,
            "speed/tokens_per_s": tokens_per_s,
            "speed/step_s": seconds / self.steps,
            "speed/mfu": tokens_per_s * self.flops / self.peak,
            "speed/data_wait": self.data_wait / seconds,
        }
        sharded = [table.traffic for _, table in self._sharded()]
        exchanging = sum(traffic.seconds for traffic in sharded)
        # On a GPU collectives are queued: the host's clock would measure the
        # queueing, not the exchange.
        if sharded and training.device.type == "cpu":
            values["speed/exchange"] = exchanging / seconds
        data = f"{self.data_wait / self.steps:.3f} s waiting for data"
        rows = (
            f", {exchanging / self.steps:.3f} s exchanging rows"
            if "speed/exchange" in values
            else ""
        )
        self.rank_report = (
            f"step {progress.step}: {seconds / self.steps:.3f} s a step, {data}{rows}"
        )
        for traffic in sharded:
            traffic.seconds = 0.0
        if training.grid is not None:
            values["train/stream_range"] = training.grid.used_range()
        if training.loss_scale.dynamic:
            values["train/loss_scale"] = training.loss_scale.value
        if training.table_optimizer is not None:
            values |= self._table_values(training.table_optimizer)
        self.restart()
        return values

    def _table_values(self, optimizer: RowAdam) -> dict[str, float]:
        """Return how the tables were read and updated in the last step, and what they sent."""
        training, recipe = self.training, self.recipe
        values: dict[str, float] = {}
        if optimizer.norm is not None:
            values["train/table_norm"] = optimizer.norm
        # One all-reduce for all tables; fp64 counts exactly up to 2^53.
        touched = all_sum(
            torch.tensor(optimizer.touched, dtype=torch.float64, device=training.device)
        ).tolist()
        tables = find_tables(training.model)
        for (name, table), (reads, rows) in zip(tables, touched, strict=True):
            never, dead = self._dead(optimizer, table)
            values |= {f"{name}/never_updated": never, f"{name}/dead": dead}
            if isinstance(table, ShardedTable):
                # Ranks that split columns update the same row, and so does every replica: of 4
                # ranks, 2 for the columns and 2 copies, all 4 count it.
                rows /= table.ranks_seeing_each_read * table.replica_count
                readers = self.ranks
                if table.layout.within_tensor_group:
                    readers //= tensor_size(training.mesh)
                tokens = self.steps * recipe.train.batch * recipe.data.length / readers
                sent = table.traffic.reads - self.sent.get(name, 0)
                values[f"{name}/sent_per_token"] = sent / tokens
                self.sent[name] = table.traffic.reads
                if table.duplicates is not None:
                    values[f"{name}/micro_batch_duplicates"] = table.duplicates
            values |= {
                f"{name}/touched": rows / table.slots,
                f"{name}/duplicates": reads / max(rows, 1),
            }
        return values

    def _dead(self, optimizer: RowAdam, table: ValueTable) -> tuple[float, float]:
        """Return the shares of rows that no step has read, and that none of the last
        `tables.dead_after` steps has.
        """
        state = optimizer.state[table.anchor]
        last, horizon = state["last_step"], state["step"] - self.recipe.tables.dead_after
        counts = torch.stack(((last == 0).sum(), (last <= horizon).sum()))
        never, lately = table.sum_over_shards(counts).tolist()
        # Ranks that split columns all count the same rows.
        rows = table.ranks_seeing_each_read * table.slots
        return never / rows, lately / rows
