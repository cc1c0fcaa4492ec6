"""Whole runs whose ranks have pieces of each sequence: the numbers and checkpoints of one process,
half of its activations.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from memshard.launch.cli.cost_text import describe_ranks
from memshard.trainer.config.load import load_recipe
from memshard.trainer.cost.estimate import estimate
from memshard.trainer.step import train_step
from tests.distributed import run_distributed
from tests.trainer.tiny_run import checkpoint_state, numbers, prepare, train_run

SETTINGS = (
    "model.mixer.kind=delta",
    "model.mixer.convolution=3",
    "model.memory.layers=[1]",
    "data.document_mask=true",
    "train.eval_every=5",
    "train.save_every=5",
    "train.keep=9",
)
PIECES = ("parallel.tensor=2", "parallel.share=sequence")


def _kept(recipe: Path, folder: Path, *settings: str) -> int:
    """Return the bytes that autograd holds of a step, weights aside."""
    run = prepare(recipe, folder, *SETTINGS, "data.length=32", "model.memory.layers=[]", *settings)
    weights = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    saved: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if (place := x.untyped_storage().data_ptr()) not in weights:
            saved[place] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        train_step(run)
    return sum(saved.values())


def _two_ranks(rank: int, world: int, recipe: Path, folder: Path) -> int:
    train_run(recipe, folder / "pieces", *SETTINGS, *PIECES)
    train_run(recipe, folder / "odd", *SETTINGS, *PIECES, "data.length=31", "train.micro_batch=4")
    # On from what one process saved.
    train_run(recipe, folder / "resumed", *SETTINGS, *PIECES)
    return _kept(recipe, folder / "kept", *PIECES)


def test_pieces_train_like_the_whole(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "one", *SETTINGS)
    train_run(recipe, tmp_path / "resumed", *SETTINGS, stop_at=5)
    train_run(recipe, tmp_path / "one odd", *SETTINGS, "data.length=31", "train.micro_batch=4")
    kept = run_distributed(_two_ranks, 2, recipe, tmp_path, timeout=400)
    for one, name in (("one", "pieces"), ("one", "resumed"), ("one odd", "odd")):
        for key in ("train/loss", "eval/loss"):
            theirs, ours = numbers(tmp_path / one, key), numbers(tmp_path / name, key)
            assert (
                list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
                and len(ours) >= 2
            ), (name, key)
    # One process goes on from what ranks saved.
    ours, theirs = (checkpoint_state(tmp_path / name) for name in ("pieces", "one"))
    assert {name: value.shape for name, value in ours.items() if name.startswith("model.")} == {
        name: value.shape for name, value in theirs.items() if name.startswith("model.")
    }
    assert train_run(recipe, tmp_path / "pieces", *SETTINGS, "train.steps=11")["step"] == 11
    assert max(kept) < 0.65 * _kept(recipe, tmp_path / "kept alone")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            (),
            "parallel.share=sequence is for linear and delta mixers, whose state keeps its size, "
            "and model.mixer has softmax",
        ),
        (
            ("model.mixer.kind=delta", "parallel.layout=tensor-columns"),
            "parallel.layout is tensor-columns, for ranks that look up equal tokens",
        ),
        (
            ("model.mixer.kind=delta", "train.segments=2"),
            "train.segments does not work where ranks share a sequence",
        ),
    ],
)
def test_what_it_is_not_for(settings: tuple[str, ...], message: str, recipe: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe, (*PIECES, *settings))


def test_what_it_costs(recipe: Path) -> None:
    """A rank has whole matrices and half the activations."""

    def cost(*settings: str) -> Any:
        return estimate(load_recipe(recipe, (*SETTINGS, "train.batch=16", *settings)), 2, 300)

    one, pieces, heads = (
        cost("parallel.tensor=1", "train.batch=32"),
        cost(*PIECES),
        cost("parallel.tensor=2"),
    )
    assert (
        pieces.bytes.dense == one.bytes.dense > heads.bytes.dense and pieces.parameters.split == 0
    )
    assert pieces.bytes.activations == pytest.approx(one.bytes.activations / 2, rel=0.01)
    assert describe_ranks(pieces) == "ranks: 2, in groups of 2 that share sequences; groups: 1"
