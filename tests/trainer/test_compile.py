"""Compiled layers compute what the others do; traces hold the steps that were asked for."""

import json
from pathlib import Path

import pytest
import torch

from memshard.trainer.config.training import TrainConfig
from tests.distributed import run_distributed
from tests.trainer.tiny_run import checkpoint_state, numbers, train_run

SETTINGS = ("model.memory.layers=[1]", "train.micro_batch=2")
MORE = (
    "data.document_mask=true",
    "model.position=rotary",
    "train.precision=bf16",
    "model.feedforward.activation=swiglu",
)


def _with_and_without(rank: int, world: int, recipe: Path, folder: Path, *more: str) -> None:
    train_run(recipe, folder / "plain", *SETTINGS, *more)
    train_run(recipe, folder / "compiled", *SETTINGS, *more, "train.compile=true", stop_at=5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    train_run(recipe, folder / "compiled", *SETTINGS, *more, "train.compile=true")


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (1, ()),
        *(pytest.param(2, more, marks=pytest.mark.slow) for more in (MORE, ("parallel.tensor=2",))),
    ],
)
def test_compiled_is_the_same(
    world: int, more: tuple[str, ...], recipe: Path, tmp_path: Path
) -> None:
    run_distributed(_with_and_without, world, recipe, tmp_path, *more, timeout=300)
    tolerance = 1e-2 if more == MORE else 1e-5
    plain, compiled = (
        numbers(tmp_path / "plain", "train/loss"),
        numbers(tmp_path / "compiled", "train/loss"),
    )
    assert (
        list(compiled.values()) == pytest.approx(list(plain.values()), rel=tolerance)
        and len(compiled) == 10
    )
    weights = {name for name in checkpoint_state(tmp_path / "plain") if name.startswith("model.")}
    assert weights == {
        name for name in checkpoint_state(tmp_path / "compiled") if name.startswith("model.")
    }


def test_a_trace_of_some_steps(recipe: Path, tmp_path: Path) -> None:
    run_distributed(_profile, 2, recipe, tmp_path / "run")
    train_run(recipe, tmp_path / "unprofiled", "train.steps=2")
    assert not (tmp_path / "unprofiled/profile").exists()
    for rank in range(2):
        events = json.loads((tmp_path / f"run/profile/rank{rank}.pt.trace.json").read_text())[
            "traceEvents"
        ]
        assert (
            len(
                [
                    event
                    for event in events
                    if event.get("name", "").startswith("Optimizer.step#AdamW")
                ]
            )
            == 2
        )
        assert any(event.get("name") == "gloo:all_reduce" for event in events)


def _profile(rank: int, world: int, recipe: Path, folder: Path) -> None:
    train_run(recipe, folder, "train.profile=[2,3]", stop_at=4)


def test_steps_to_trace_are_in_order() -> None:
    with pytest.raises(
        ValueError, match=r"train.profile is \[3, 2\]; expected the first and last step"
    ):
        TrainConfig(profile=(3, 2))
    with pytest.raises(ValueError, match="counted from 1"):
        TrainConfig(profile=(0, 2))
