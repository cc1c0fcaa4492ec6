"""Measure which slots of a model's tables are read, on all ranks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memshard.models.memory.check_input import kind_of
from memshard.models.memory.slot_usage import UsageCounter, UsageReport
from memshard.models.memory.table import find_tables
from memshard.parallel.collectives import all_rows, all_sum
from memshard.parallel.tables.sharded import ShardedTable


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each part has the mode that it had."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # Not model.train(): some parts may have been in evaluation mode within a training model.
        for part, training in modes:
            part.training = training


@contextmanager
def observed_usage(model: nn.Module) -> Iterator[dict[str, UsageCounter]]:
    """Count the reads of every table inside the context. Yields counters by the table's name."""
    counters = {name: UsageCounter(table) for name, table in find_tables(model)}
    for counter in counters.values():
        counter.table.observer = counter
    try:
        yield counters
    finally:
        for counter in counters.values():
            counter.table.observer = None


def usage_reports(counters: dict[str, UsageCounter]) -> dict[str, UsageReport]:
    """Return reports over all rows and all ranks' reads. Every rank calls it once."""
    return {name: _report(counter) for name, counter in counters.items()}


def _report(counter: UsageCounter) -> UsageReport:
    table = counter.table
    if not isinstance(table, ShardedTable):
        # Every rank has all rows, and saw its own reads.
        counter.merge(all_sum)
        return counter.report()
    if table.replicas is not None:
        counter.merge(lambda counts: all_sum(counts, table.replicas))
    if table.ranks_seeing_each_read > 1:
        # Every rank has seen all reads.
        return counter.report()
    return counter.report(
        lambda parts: all_sum(parts, table.group), lambda rows: all_rows(rows, table.group)
    )


def slot_usage(model: nn.Module, batches: Iterable[Any]) -> dict[str, UsageReport]:
    """Return how the slots of every value table are read over some batches, by the table's name.
    The model runs without gradients and in evaluation mode.

    batches: arguments of the model, tensors or mappings of keyword arguments. TypeError for what is
    no model, or a single batch.
    """
    with observed_usage(model) as counters:
        if (
            isinstance(batches, Tensor)
            or hasattr(batches, "keys")
            or not hasattr(batches, "__iter__")
        ):
            raise TypeError(
                f"slot_usage takes several batches, such as [batch] or a DataLoader, not "
                f"{kind_of(batches)}"
            )
        with torch.no_grad(), in_evaluation(model):
            for batch in batches:
                model(**batch) if hasattr(batch, "keys") else model(batch)
    return usage_reports(counters)
