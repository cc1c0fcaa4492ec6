"""Stages of `memshard bench gpu` on a fake GPU: no mixed devices, and numbers of a CPU."""

from pathlib import Path
from pkgutil import resolve_name

import pytest

from memshard.bench.gpu.bench import Bench, Result
from memshard.trainer.cost.counted.step import LAUNCHES
from tests.gpu.fake_cuda import fake_cuda, on_fake_cuda
from tests.gpu.test_training import train


def _results(stage: str, folder: Path, most: int) -> dict[str, Result]:
    """Return the results of a stage, up to a number of them."""
    run = resolve_name(f"memshard.bench.gpu.stages.{stage}:run")
    with fake_cuda():
        results = run(Bench("cuda", folder, folder, seconds=600))
        return dict(result for result, _ in zip(results, range(most), strict=False))


def test_twins_are_compared(tmp_path: Path) -> None:
    (result,) = on_fake_cuda(_results, "twins", tmp_path, 1).values()
    assert result["ok"], result
    assert result["fp32"]["gradients"] < 1e-5 < result["bf16"]["gradients"]
    assert result["device to CPU"]["ok"] and result["greedy text"]["ok"]


@pytest.mark.slow
# Not speed: the profiler of torch for CPUs ends a process where an operation is on a GPU.
@pytest.mark.parametrize(("stage", "most"), [("kernels", 5), ("bandwidth", 9)])
def test_stages_mix_no_devices(tmp_path: Path, stage: str, most: int) -> None:
    results = on_fake_cuda(_results, stage, tmp_path, most)
    assert not [name for name, result in results.items() if "problem" in result], results


def _asked(recipe: Path, folder: Path, memory: str) -> tuple[int, int]:
    """Return launches and waits of a third step."""
    overrides = (memory, "model.memory.share=false", "train.precision=bf16", "model.dropout=0")
    _, counts = train(recipe, folder, overrides, "cuda:0")
    return counts.launches.total(), counts.waits.total() + counts.blocking.total()


def test_the_planner_knows_what_a_memory_asks_of_a_gpu(recipe: Path, tmp_path: Path) -> None:
    with_memory = on_fake_cuda(_asked, recipe, tmp_path / "with", "model.memory.layers=[1]")
    without = on_fake_cuda(_asked, recipe, tmp_path / "without", "model.memory.layers=[]")
    launches, waits = (x - y for x, y in zip(with_memory, without, strict=True))
    assert 0 < launches <= LAUNCHES and waits == 0, (launches, waits)
