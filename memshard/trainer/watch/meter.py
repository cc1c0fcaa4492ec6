"""What happens between two lines of metrics: losses, speed, table traffic."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from memshard.models.memory.table import ValueTable, find_tables
from memshard.parallel.collectives import all_sum
from memshard.parallel.tables.sharded import ShardedTable
from memshard.trainer.cost.operations import flops_per_token
from memshard.trainer.cost.this_machine import peak_flops
from memshard.trainer.run import Run
from memshard.trainer.step import StepOutcome


class Meter:
    """Sums the outcomes of steps until they are read."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.flops = flops_per_token(run.recipe.model, run.recipe.data.length)
        self.peak = peak_flops(run.device, run.dtype) * run.ranks
        self.sent: dict[str, int] = {}
        self.own = ""
        """The last reading in the words of this rank: what differs from rank to rank."""
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        self.loss = 0.0
        self.steps = self.tokens = 0
        self.data_wait = 0.0
        self.begun = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around an evaluation or save, whose time and traffic are not training's."""
        begun = time.perf_counter()
        before = {name: replace(table.traffic) for name, table in self._sharded()}
        yield
        self.begun += time.perf_counter() - begun
        for name, table in self._sharded():
            table.traffic.reads, table.traffic.seconds = before[name].reads, before[name].seconds

    def _sharded(self) -> Iterator[tuple[str, ShardedTable]]:
        return (
            (name, table)
            for name, table in find_tables(self.run.model)
            if isinstance(table, ShardedTable)
        )

    def add(self, outcome: StepOutcome) -> None:
        """Count a step."""
        self.loss += outcome.loss
        self.steps += 1
        self.tokens += outcome.tokens
        self.data_wait += outcome.data_wait
        self.last = outcome

    def read(self) -> dict[str, float]:
        """The means since the last reading; all ranks call it."""
        seconds = time.perf_counter() - self.begun
        recipe = self.run.recipe
        tokens_per_s = self.tokens / seconds
        values = {
            "train/loss": self.loss / self.steps,
            "train/lr": self.last.rate,
            "train/grad_norm": self.last.norm,
            "train/skipped": float(self.run.progress.skipped),
            "train/spikes": float(self.run.progress.spikes),
            "train/rewinds": float(self.run.progress.rewinds),
            "speed/tokens_per_s": tokens_per_s,
            "speed/step_s": seconds / self.steps,
            "speed/mfu": tokens_per_s * self.flops / self.peak,
            "speed/data_wait": self.data_wait / seconds,
        }
        sharded = [table.traffic for _, table in self._sharded()]
        exchanging = sum(traffic.seconds for traffic in sharded)
        if sharded and self.run.device.type == "cpu":
            values["speed/exchange"] = exchanging / seconds
        data = f"{self.data_wait / self.steps:.3f} s waiting for data"
        rows = (
            f", {exchanging / self.steps:.3f} s exchanging rows"
            if "speed/exchange" in values
            else ""
        )
        self.own = (
            f"step {self.run.progress.step}: {seconds / self.steps:.3f} s a step, {data}{rows}"
        )
        for traffic in sharded:
            traffic.seconds = 0.0
        if self.run.saving.seconds is not None:
            values["speed/save_total_s"], self.run.saving.seconds = self.run.saving.seconds, None
        if self.run.model.grid is not None:
            values["train/stream_range"] = self.run.model.grid.used_range()
        if self.run.loss_scale.dynamic:
            values["train/loss_scale"] = self.run.loss_scale.value
        if self.run.rows is not None:
            if self.run.rows.norm is not None:
                values["train/table_norm"] = self.run.rows.norm
            touched = all_sum(
                torch.tensor(self.run.rows.touched, dtype=torch.float64, device=self.run.device)
            ).tolist()
            for (name, table), (reads, rows) in zip(
                find_tables(self.run.model), touched, strict=True
            ):
                values[f"{name}/never_updated"], values[f"{name}/dead"] = self._dead(table)
                if isinstance(table, ShardedTable):
                    # Every column of a row, and every copy of it, is updated somewhere.
                    rows /= table.ranks_seeing_each_read * table.replica_count
                    same = table.layout.within_tensor_group
                    readers = self.run.data_ranks if same else self.run.ranks
                    tokens = self.steps * recipe.train.batch * recipe.data.length / readers
                    values[f"{name}/sent_per_token"] = (
                        table.traffic.reads - self.sent.get(name, 0)
                    ) / tokens
                    self.sent[name] = table.traffic.reads
                    if table.duplicates is not None:
                        values[f"{name}/micro_batch_duplicates"] = table.duplicates
                values |= {
                    f"{name}/touched": rows / table.slots,
                    f"{name}/duplicates": reads / max(rows, 1),
                }
        self.restart()
        return values

    def _dead(self, table: ValueTable) -> tuple[float, float]:
        """The shares of rows that no step has read, and that none of the last `tables.dead_after`
        has.
        """
        assert self.run.rows is not None
        state = self.run.rows.state[table.anchor]
        last, horizon = state["last_step"], state["step"] - self.run.recipe.tables.dead_after
        never, lately = table.sum_over_shards(
            torch.stack(((last == 0).sum(), (last <= horizon).sum()))
        ).tolist()
        # Ranks that split columns all count the same rows.
        return (
            never / table.ranks_seeing_each_read / table.slots,
            lately / table.ranks_seeing_each_read / table.slots,
        )
