"""Rank 0 of eight on a fake GPU, with every way to split a model."""

from pathlib import Path

import pytest

from memshard.trainer.config.load import load_recipe
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step
from tests.gpu.fake_cuda import Counts, fake_cuda, on_fake_cuda
from tests.gpu.fake_ranks import fake_ranks

FAST = {
    "columns": ("parallel.layout=columns", "tables.clip=1.0"),
    "replicas": ("parallel.layout=rows", "parallel.memory=4"),
    "sequence": ("parallel.tensor=2", "parallel.share=sequence", "model.mixer.kind=delta"),
}
SLOW = {
    "rows, unique": ("parallel.layout=rows-unique",),
    "zero": ("parallel.layout=columns", "train.zero=1"),
    "peer": ("parallel.layout=rows", "model.memory.kind=peer"),
    "tensor": ("parallel.tensor=2", "parallel.layout=tensor-columns"),
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
    "overrides",
    [
        *(pytest.param(overrides, id=name) for name, overrides in FAST.items()),
        *(pytest.param(x, id=name, marks=pytest.mark.slow) for name, x in SLOW.items()),
    ],
)
def test_nothing_is_exchanged_from_host_memory(
    recipe: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """NCCL takes tensors on the GPU only; others would go another way, and wait."""
    counts = on_fake_cuda(train, recipe, tmp_path / "run", overrides)
    assert counts.exchanges
    assert not [what for what, _ in counts.exchanges if "cpu" in what.split()], counts
