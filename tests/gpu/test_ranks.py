"""Rank 0 of eight on a fake GPU, with every way to split a model."""

from pathlib import Path

import pytest

from memshard.trainer.config.load import load_recipe
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step
from tests.gpu.fake_cuda import Counts, fake_cuda, on_fake_cuda
from tests.gpu.fake_ranks import fake_ranks

SEQUENCE = ("parallel.tensor=2", "parallel.share=sequence", "model.mixer.kind=delta")
FAST = {
    "columns": (0, 0, ("parallel.layout=columns", "tables.clip=1.0")),
    "replicas": (2 + 1, 1, ("parallel.layout=rows", "parallel.memory=4")),
    "sequence": (0, 0, ("parallel.layout=columns", "train.micro_batch=1", *SEQUENCE)),
}
"""Waits for sizes that the search decides, exchanges from host memory of numbers that it knows, and
the settings. Two layers read one table: a split by rows waits once a read, replicas once a step.
"""
SLOW = {
    "rows, unique": (2, 0, ("parallel.layout=rows-unique",)),
    "micro-batches": (0, 0, ("parallel.layout=columns", "train.micro_batch=1")),
    "replicas of columns": (1, 1, ("parallel.layout=columns", "parallel.memory=4")),
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
