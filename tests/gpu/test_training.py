"""A run on a CUDA device is the run on a CPU: no mixed devices, and the same losses. The host waits
once a step, for the verdict.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch

from memshard.bench.gpu.configurations import MAIN, OTHERS
from memshard.models.decode.generate import generate
from memshard.trainer.config.load import load_recipe
from memshard.trainer.loop import evaluate_run
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step
from memshard.trainer.watch.meter import Meter
from tests.gpu.fake_cuda import Counts, fake_cuda, on_fake_cuda

_OF_MEMORIES = ("models/memory/", "models/kernels/", "trainer/optim/rows/")
_MORE_WAITS = {
    "adaptive": 4,  # torch's module asks which tokens each cluster has
    "check inversion": 2,  # each block asks whether it rebuilt its input
}


def train(
    recipe: Path,
    folder: Path,
    overrides: tuple[str, ...],
    device: str,
    capability: tuple[int, int] = (9, 0),
) -> tuple[list[float], Counts]:
    """Return the losses of three steps, and what the last one asked of the device."""
    with fake_cuda(capability) as watch:
        settings = load_recipe(recipe, ("train.precision=fp32", *overrides))
        run = set_up(settings, folder, device)
        losses = [train_step(run).loss for _ in range(2)]
        with watch.counted() as counts:
            losses.append(train_step(run).loss)
    return losses, counts


@pytest.mark.parametrize(
    "overrides",
    [
        *(pytest.param(overrides, id=name) for name, overrides in MAIN.items()),
        *(pytest.param(x, id=name, marks=pytest.mark.slow) for name, x in OTHERS.items()),
    ],
)
def test_a_run_is_that_of_a_cpu_and_waits_for_its_verdict_alone(
    recipe: Path, tmp_path: Path, overrides: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    losses, counts = on_fake_cuda(train, recipe, tmp_path / "cuda", overrides, "cuda:0")
    twin, on_cpu = on_fake_cuda(train, recipe, tmp_path / "cpu", overrides, "cpu")
    tolerance = 1e-3 if "train.precision=fp16" in overrides else 1e-5
    assert losses == pytest.approx(twin, rel=tolerance)
    assert counts.launches.total() > 100 and not on_cpu.launches
    name = request.node.callspec.id
    assert len(_elsewhere(counts.waits)) == 1 + _MORE_WAITS.get(name, 0), counts
    # The gradients of tables in host memory are copied from there.
    assert "tables.place=host" in overrides or not _elsewhere(counts.blocking), counts
    # Rows in host memory are looked up there; sub-keys are split once in tables.dead_after steps.
    if not {"tables.place=host", "tables.revive=true"} & {*overrides}:
        asked = counts.waits + counts.blocking
        assert not [key for key in asked if key[1].startswith(_OF_MEMORIES)], counts


def _elsewhere(counter: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return what was counted outside of memories."""
    return [key for key in counter.elements() if not key[1].startswith(_OF_MEMORIES)]


def test_kernels_are_chosen_by_the_capability(recipe: Path, tmp_path: Path) -> None:
    _, counts = on_fake_cuda(train, recipe, tmp_path / "9", (), "cuda:0")
    kernels = {"triton gather_sum", "triton adam_rows", "triton best_pairs"}
    assert {what for what, _ in counts.launches} >= kernels
    _, counts = on_fake_cuda(train, recipe, tmp_path / "6", (), "cuda:0", (6, 0))
    assert not any("triton" in what for what, _ in counts.launches)


def test_dropout_is_one_launch_each_way(recipe: Path, tmp_path: Path) -> None:
    counts = [
        on_fake_cuda(train, recipe, tmp_path / str(rate), (f"model.dropout={rate}",), "cuda:0")[1]
        for rate in (0.0, 0.1)
    ]
    without, with_dropout = (count.launches.total() for count in counts)
    # The embedding's, and two in each of two layers.
    assert with_dropout - without == 2 * 5


def _after_training(recipe: Path, folder: Path, device: str) -> tuple[float, float, list[int]]:
    with fake_cuda():
        run = set_up(load_recipe(recipe, ("train.precision=fp32",)), folder, device)
        meter = Meter(run, run.recipe, run.ranks)
        meter.add(train_step(run))
        loss = evaluate_run(run).loss
        usage = meter.read(run.progress)["train/loss"]
        run.model.eval()
        prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
        tokens = generate(run.model, prompt, 4, temperature=0.0)
        return loss, usage, tokens.tolist()


def test_evaluation_metrics_and_generation_are_those_of_a_cpu(recipe: Path, tmp_path: Path) -> None:
    ours = on_fake_cuda(_after_training, recipe, tmp_path / "cuda", "cuda:0")
    theirs = on_fake_cuda(_after_training, recipe, tmp_path / "cpu", "cpu")
    # Batch norm is torch's on a GPU; Adam's first step takes the signs of tiny gradients.
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-4) and ours[2] == theirs[2]
