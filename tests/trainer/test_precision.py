"""fp16 and its loss scale: overflows, resuming, and the loss curve of fp32."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from memshard.launch.cli.main import main
from memshard.trainer.config.training import LossScaleConfig
from memshard.trainer.precision import LossScale, compute_dtype
from memshard.trainer.step import train_step
from tests.data_pipeline.conftest import build
from tests.distributed import run_distributed
from tests.trainer.overflow import OVERFLOWS
from tests.trainer.tiny_run import (
    TABLE,
    assert_same,
    checkpoint_state,
    numbers,
    prepare,
    snapshot,
    train_run,
)

FP16 = ("train.precision=fp16", "train.micro_batch=2", "model.memory.query_norm=lagged")
TEXT = Path(__file__).parents[3] / "shared" / "data" / "text" / "wikipedia_en_extract.txt.gz"


def test_the_scale_falls_with_each_overflow_and_grows_after_a_while_without() -> None:
    scale = LossScale(LossScaleConfig(initial=8, growth_interval=2, minimum=2), torch.float16)
    values = []
    for overflow in (False, False, False, True, False, False, True, True):
        scale.update(overflow)
        values.append(scale.value)
    assert values == [8, 16, 16, 8, 8, 16, 8, 4]
    again = LossScale(LossScaleConfig(), torch.float16)
    again.restore(json.loads(json.dumps(scale.state())))
    assert vars(again) == {**vars(scale), "config": again.config}
    scale.update(True)
    assert scale.value == 2 and not scale.exhausted
    scale.update(True)
    assert scale.exhausted
    scale.restore({})  # a rewind to what bf16 has trained
    assert scale.value == 8 and scale.clean_steps == 0


def test_other_arithmetic_has_no_scale() -> None:
    scale = LossScale(LossScaleConfig(), torch.bfloat16)
    scale.update(True)
    scale.restore({"value": 8.0, "clean_steps": 1})
    assert scale.value == 1 and scale.state() == {}


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_automatic_precision_follows_the_capability(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert compute_dtype("auto", torch.device("cuda")) == expected
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32


def overflow_on_one_rank(
    rank: int, world: int, recipe: Path, folder: Path, *overrides: str
) -> list[float]:
    """Let every second step have a gradient that overflows on the last rank only; return
    all loss scales.
    """
    run = prepare(recipe, folder, *FP16, *overrides)
    train_step(run)
    scales = [run.loss_scale.value]
    for number, overflow in enumerate(OVERFLOWS.values(), 1):
        before = snapshot(run)
        with overflow(run):
            outcome = train_step(run)
        assert outcome.rate == 0
        assert_same(snapshot(run), before)
        assert (run.progress.step, run.progress.skipped, run.progress.in_a_row) == (
            2 * number,
            number,
            1,
        )
        scales.append(run.loss_scale.value)
        assert train_step(run).rate > 0
        after = snapshot(run)
        for name in (
            "model.embedding.weight",
            "model.blocks.1.memory.query_norm.running_mean",
            f"exp_avg.{TABLE}.weight",
        ):
            # DeepSpeed keeps each dense tensor on one rank.
            assert name not in after or (
                not torch.equal(after[name], before[name]) and after[name].isfinite().all()
            ), name
    return scales


@pytest.mark.parametrize("world", [1, 2])
def test_an_overflow_on_one_rank_halves_the_scale_and_changes_nothing_else(
    world: int, recipe: Path, tmp_path: Path
) -> None:
    if world == 1:
        scales = [overflow_on_one_rank(0, 1, recipe, tmp_path / "run")]
    else:
        scales = run_distributed(overflow_on_one_rank, world, recipe, tmp_path / "run")
    assert scales == [[65536.0, 32768.0, 16384.0]] * world


def test_the_scale_leaves_the_update_alone(recipe: Path, tmp_path: Path) -> None:
    """It does in fp32, where no gradient is lost: dense weights, table rows, and the norms that
    clip them are equal.
    """
    runs = [
        prepare(recipe, tmp_path / name, "tables.clip=0.01", "train.clip=0.1")
        for name in ("1", "4096")
    ]
    runs[1].loss_scale.value = 4096
    outcomes = [[train_step(run) for _ in range(3)] for run in runs]
    for plain, scaled in zip(*outcomes, strict=True):
        torch.testing.assert_close(scaled.norm, plain.norm)
    assert_same(snapshot(runs[1]), snapshot(runs[0]))


def test_resuming_in_fp16_is_exact(recipe: Path, tmp_path: Path) -> None:
    """The scale grows at every third good step, and the first ones overflow."""
    settings = (*FP16, "train.loss_scale.initial=3e38", "train.loss_scale.growth_interval=3")
    train_run(recipe, tmp_path / "whole", *settings, "train.steps=150", stop_at=125)
    train_run(recipe, tmp_path / "stopped", *settings, "train.steps=150", stop_at=119)
    train_run(recipe, tmp_path / "stopped", *settings, "train.steps=150", stop_at=125)
    whole = checkpoint_state(tmp_path / "whole")
    assert_same(checkpoint_state(tmp_path / "stopped"), whole)
    scales = numbers(tmp_path / "whole", "train/loss_scale")
    assert (
        scales == numbers(tmp_path / "stopped", "train/loss_scale")
        and scales[125] == whole["loss_scale"]["value"]
    )
    assert max(scales[step] / scales[step - 1] for step in range(2, 126)) == 2


def test_a_run_whose_scale_falls_too_low_says_so(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "train",
        str(recipe),
        "--run",
        str(tmp_path / "run"),
        *FP16,
        "optimizer.lr=1e38",
        "train.steps=40",
        "--json",
    ]
    assert main(argv) == 1
    assert (
        "the loss scale fell to 0.5, below train.loss_scale.minimum"
        in json.loads(capfd.readouterr().out)["error"]
    )


@pytest.mark.slow
@pytest.mark.skipif(not TEXT.exists(), reason="needs shared/data")
def test_200_steps_in_fp16_follow_fp32(recipe: Path, tmp_path: Path) -> None:
    with gzip.open(TEXT, "rt", encoding="utf-8") as source:
        (tmp_path / "text.txt").write_text(source.read(2_000_000), encoding="utf-8")
    build(tmp_path / "text.txt", tmp_path / "data", vocab_size=1000)
    settings = (
        f"data.path={tmp_path / 'data'}",
        "data.length=64",
        "model.dim=64",
        "model.memory.keys=32",
        "model.memory.heads=4",
    )
    settings += (
        "model.memory.layers=[1]",
        "train.steps=200",
        "optimizer.lr=1e-3",
        "train.micro_batch=null",
    )
    losses = {}
    for precision in ("fp32", "fp16"):
        train_run(recipe, tmp_path / precision, *settings, f"train.precision={precision}")
        losses[precision] = numbers(tmp_path / precision, "train/loss")
    assert losses["fp32"][200] < losses["fp32"][1] - 0.9
    for step in range(1, 201):
        assert losses["fp16"][step] == pytest.approx(losses["fp32"][step], rel=0.01), step
