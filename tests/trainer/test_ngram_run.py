"""A run with n-gram memories: a resumed run is the same run, and its reads are counted."""

from pathlib import Path

import pytest
import torch

from memshard.trainer.evaluation.slot_usage import slot_usage
from tests.trainer.tiny_run import assert_same, checkpoint_state, prepare, train_run

NGRAM = ("model.ngram.layers=[0,1]", "model.ngram.rows=50", "model.ngram.value_dim=4")


@pytest.mark.parametrize("carried", [False, True])
def test_three_and_three_steps_are_six(carried: bool, recipe: Path, tmp_path: Path) -> None:
    settings = (*NGRAM, "model.ngram.token_map=text", "train.steps=6", "train.eval_every=0")
    if carried:
        settings += ("model.mixer.kind=delta", "train.carry_state=true", "model.position=none")
    train_run(recipe, tmp_path / "whole", *settings)
    train_run(recipe, tmp_path / "parts", *settings, stop_at=3)
    train_run(recipe, tmp_path / "parts", *settings)
    assert_same(checkpoint_state(tmp_path / "whole"), checkpoint_state(tmp_path / "parts"))


def test_usage_is_counted(recipe: Path, tmp_path: Path) -> None:
    run = prepare(recipe, tmp_path, *NGRAM)
    reports = slot_usage(run.model, [torch.randint(250, (2, 8))])
    usage = reports["blocks.1.ngram.values"]
    # 16 tokens read 16 rows each.
    assert usage.reads_per_slot * run.recipe.model.ngram.slots(300, 1) == pytest.approx(256)
