"""Runs with reversible and checkpointed blocks: the grid's range, resuming, one curve with and
without checkpointing.
"""

import logging
from pathlib import Path

import pytest
import torch

from memshard.models.recompute.checkpointing import Recompute
from memshard.trainer.step import train_step
from tests.distributed import run_distributed
from tests.trainer.tiny_run import (
    assert_same,
    checkpoint_state,
    numbers,
    prepare,
    snapshot,
    train_run,
)

_REVERSIBLE = ("model.residual=reversible", "train.micro_batch=2", "train.check_inversion=true")
_SCALE = "model.grid.scale"


def _leave_the_range(rank: int, world: int, recipe: Path, folder: Path) -> list[float]:
    """Let a stream of the last rank go beyond 1024 in the second step; return loss scales."""
    run = prepare(
        recipe, folder, *_REVERSIBLE, "train.precision=fp16", "model.memory.query_norm=lagged"
    )
    train_step(run)
    scales = [run.loss_scale.value]
    before = snapshot(run)
    assert before[_SCALE] == 2**14
    with pytest.MonkeyPatch.context() as patch:
        if rank == world - 1:
            block, feed = run.model.blocks[1], run.model.blocks[1].feedforward_branch
            patch.setattr(
                block,
                "feedforward_branch",
                lambda x, *args: feed(x, *args) + 2000 * block.feedforward_residual.before(x),
            )
            run.model.configure(Recompute())
        assert train_step(run).rate == 0
    after = snapshot(run)
    assert after.pop(_SCALE) == 2**12 and before.pop(_SCALE) == 2**14
    assert_same(after, before)
    assert (run.progress.step, run.progress.skipped, run.progress.in_a_row) == (2, 1, 1)
    scales.append(run.loss_scale.value)
    run.model.configure(Recompute(check_inversion=True))
    assert train_step(run).rate > 0
    assert not torch.equal(
        snapshot(run)["model.embedding.weight"], before["model.embedding.weight"]
    )
    return scales


@pytest.mark.parametrize("world", [1, 2])
def test_leaving_the_grid_skips_the_step_and_makes_it_coarser(
    world: int, recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if world == 1:
        with caplog.at_level(logging.WARNING):
            scales = [_leave_the_range(0, 1, recipe, tmp_path / "run")]
        assert "a stream of block 1 reached" in caplog.text and "it ends at 4096 now" in caplog.text
    else:
        scales = run_distributed(_leave_the_range, world, recipe, tmp_path / "run")
    # An overflow would have halved it.
    assert scales == [[65536.0, 65536.0]] * world


def test_resuming_is_exact(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "whole", *_REVERSIBLE)
    train_run(recipe, tmp_path / "stopped", *_REVERSIBLE, stop_at=5)
    train_run(recipe, tmp_path / "stopped", *_REVERSIBLE)
    whole = checkpoint_state(tmp_path / "whole")
    assert_same(checkpoint_state(tmp_path / "stopped"), whole)
    assert whole[_SCALE] == 2**14
    assert 0 < numbers(tmp_path / "whole", "train/stream_range")[10] < 0.1


def _train(rank: int, world: int, recipe: Path, folder: Path, *overrides: str) -> None:
    train_run(recipe, folder, *overrides)


@pytest.mark.parametrize("world", [1, 2])
def test_checkpointing_changes_no_bit_and_may_change_on_resume(
    world: int, recipe: Path, tmp_path: Path
) -> None:
    for name, *overrides in (
        ("plain",),
        ("full", "train.checkpointing=full"),
        ("mixed", "train.steps=5", "train.checkpointing=selective"),
        ("mixed", "train.checkpointing=full"),
    ):
        settings = ("train.micro_batch=3", *overrides)
        if world == 1:
            _train(0, 1, recipe, tmp_path / name, *settings)
        else:
            run_distributed(_train, world, recipe, tmp_path / name, *settings)
    plain = checkpoint_state(tmp_path / "plain")
    assert_same(checkpoint_state(tmp_path / "full"), plain)
    assert_same(checkpoint_state(tmp_path / "mixed"), plain)


def _train_compiled(rank: int, world: int, recipe: Path, folder: Path) -> None:
    # A process of its own, where what the compiler warns of is no error.
    settings = (
        "model.memory.layers=[1]",
        "model.norm=rms",
        "data.document_mask=true",
        "train.precision=bf16",
        "train.steps=4",
    )
    train_run(recipe, folder / "plain", *_REVERSIBLE, *settings)
    train_run(recipe, folder / "compiled", *_REVERSIBLE, *settings, "train.compile=true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_compiled_blocks_invert(recipe: Path, tmp_path: Path) -> None:
    run_distributed(_train_compiled, 1, recipe, tmp_path, timeout=300)
    plain, compiled = (
        list(numbers(tmp_path / name, "train/loss").values()) for name in ("plain", "compiled")
    )
    assert compiled == pytest.approx(plain, rel=1e-2) and len(compiled) == 4


def test_settings_that_do_not_go_together(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="train.checkpointing is full, but reversible blocks keep nothing"
    ):
        prepare(recipe, tmp_path, *_REVERSIBLE, "train.checkpointing=full")
    with pytest.raises(
        ValueError,
        match="train.check_inversion is for model.residual=reversible, which is pre here",
    ):
        prepare(recipe, tmp_path, "train.check_inversion=true")
