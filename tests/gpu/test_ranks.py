"""Rank 0 of eight on a fake GPU, with every way to split a model."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from memshard.models.memory.row_gradient import Read, sort_reads
from memshard.models.memory.table import ValueTable
from memshard.parallel.collectives import Traffic
from memshard.parallel.tables.replicas import add_replicas
from memshard.trainer.config.load import load_recipe
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step
from tests.gpu.fake_cuda import Counts, fake_cuda, on_fake_cuda
from tests.gpu.fake_ranks import fake_ranks

SEQUENCE = ("parallel.tensor=2", "parallel.share=sequence", "model.mixer.kind=delta")
FAST = {
    "columns": (0, 0, ("parallel.layout=columns", "tables.clip=1.0")),
    "replicas": (2 + 2, 0, ("parallel.layout=rows", "parallel.memory=4")),
    "sequence": (0, 0, ("parallel.layout=columns", "train.micro_batch=1", *SEQUENCE)),
}
"""Waits for sizes that the search decides, exchanges from host memory of numbers that it knows, and
the settings. Two layers read one table: a split by rows waits once a read, replicas twice a step:
for the number of rows that each has, and that all have together.
"""
SLOW = {
    "rows, unique": (2, 0, ("parallel.layout=rows-unique",)),
    "micro-batches": (0, 0, ("parallel.layout=columns", "train.micro_batch=1")),
    "replicas of columns": (2, 0, ("parallel.layout=columns", "parallel.memory=4")),
    "zero": (0, 0, ("parallel.layout=columns", "train.zero=1")),
    "peer": (4, 0, ("parallel.layout=rows", "model.memory.kind=peer")),
    "tensor": (1, 1, ("parallel.tensor=2", "parallel.layout=tensor-columns")),
    "tensor, rows": (2, 0, ("parallel.tensor=2", "parallel.layout=rows")),
}


def train(recipe: Path, folder: Path, overrides: tuple[str, ...]) -> Counts:
    """Return what a step of rank 0 of eight asks of the device."""
    with fake_cuda() as watch, fake_ranks(8):
        settings = load_recipe(recipe, ("train.batch=16", "model.dropout=0", *overrides))
        run = set_up(settings, folder, "cuda:0")
        train_step(run)
        with watch.counted() as counts:
            train_step(run)
    return counts


@pytest.mark.parametrize(
    ("waits", "host", "overrides"),
    [
        *(pytest.param(*setting, id=name) for name, setting in FAST.items()),
        *(pytest.param(*x, id=name, marks=pytest.mark.slow) for name, x in SLOW.items()),
    ],
)
def test_a_step_exchanges_on_gpus_and_waits_for_sizes_alone(
    recipe: Path, tmp_path: Path, waits: int, host: int, overrides: tuple[str, ...]
) -> None:
    """NCCL takes tensors on the GPU only. What it sends must not pass through the host, and what
    the host knows must not pass through the GPU.
    """
    counts = on_fake_cuda(train, recipe, tmp_path / "run", overrides)
    from_host = sum(n for (what, _), n in counts.exchanges.items() if "cpu" in what.split())
    # The step's number of tokens besides.
    assert from_host == host + 1 < counts.exchanges.total(), counts
    here = ("parallel/", "trainer/step.py")
    assert sum(n for (_, line), n in counts.waits.items() if line.startswith(here)) == waits, counts
    assert not [line for _, line in counts.blocking if line.startswith(here)], counts


def _summed_over_copies() -> tuple[list[int], int]:
    """Return the rows that two of two ranks' reads are summed for, and the bytes sent for it."""
    with fake_cuda(), fake_ranks(2):
        table = ValueTable(10, 4).cuda()
        rows, traffic = torch.tensor([5, 5, 2, 5]).cuda(), Traffic()
        read = Read(rows, torch.ones(4).cuda(), torch.arange(4).cuda(), torch.ones(4, 4).cuda())
        merged = sort_reads([read], table.backend, 10)
        group, like = dist.group.WORLD, torch.zeros(1).cuda()
        (part,) = add_replicas(merged, 10, 4, like, group, traffic, table.backend)
        return part.rows.tolist(), traffic.replicas


def test_copies_of_a_table_send_each_row_once() -> None:
    """Two row numbers of 4 bytes, and half of two sums of 4 values there and back."""
    assert on_fake_cuda(_summed_over_copies) == ([2, 5], 2 * 4 + 2 * 4 * 4)
