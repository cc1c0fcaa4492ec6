"""Fast weights that go on from step to step: a stream in pieces is the stream, whatever happens to
the run in between.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memshard.launch.cli.main import main
from memshard.models.loss import token_losses
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.config.load import load_recipe
from memshard.trainer.run import Run
from memshard.trainer.step import train_step
from tests.data_pipeline.conftest import build, write_corpus
from tests.distributed import run_distributed
from tests.trainer.overflow import dense_overflow
from tests.trainer.test_evaluation import held_out_windows
from tests.trainer.test_ranks import load_whole
from tests.trainer.tiny_run import RECIPE, assert_same, checkpoint_state, prepare, train_run

CARRY = (
    "train.carry_state=true",
    "model.position=none",
    "model.mixer.kind=delta",
    "model.mixer.features=dpfp",
    "model.memory.query_norm=layer",
)
FROZEN = ("optimizer.lr=0", "tables.lr=0", "model.dropout=0")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe for short documents."""
    folder = tmp_path_factory.mktemp("carried")
    write_corpus(folder / "text", documents=40, seed=2)
    build(folder / "text", folder / "data", vocab_size=300)
    (folder / "tiny.yaml").write_text(RECIPE.format(data=folder / "data"))
    return folder / "tiny.yaml"


def _loud(run: Run) -> Run:
    """Make weights so large that what mixers remember matters."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter += torch.randn(parameter.shape, generator=draw) * 0.3
    return run


def _loss(recipe: Path, folder: Path, steps: int, *settings: str) -> float:
    """Return the loss of a tiny model that does not learn, over steps that cover the same 48 tokens
    of every lane.
    """
    run = _loud(
        prepare(
            recipe,
            folder / f"{steps} {settings}",
            *CARRY,
            *FROZEN,
            f"data.length={48 // steps}",
            *settings,
        )
    )
    return sum(train_step(run).loss for _ in range(steps)) / steps


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ((), 1e-5),
        (("data.document_mask=true", "train.micro_batch=3", "model.mixer.convolution=3"), 1e-5),
        (("model.mixer.kind=linear", "train.checkpointing=full", "train.chunk=7"), 1e-5),
        (("model.mixer.convolution=3", "train.segments=3"), 1e-5),
        # Roundings to the grid differ where sums do.
        (
            ("data.document_mask=true", "model.residual=reversible", "train.check_inversion=true"),
            1e-4,
        ),
    ],
    ids=str,
)
def test_any_split_of_a_stream_gives_the_losses_of_one_pass(
    settings: tuple[str, ...], tolerance: float, recipe: Path, tmp_path: Path
) -> None:
    whole = _loss(recipe, tmp_path, 1, *settings)
    for steps in (2, 6):
        assert _loss(recipe, tmp_path, steps, *settings) == pytest.approx(whole, abs=tolerance)
    assert (
        abs(_loss(recipe, tmp_path, 6, *settings, "train.carry_state=false") - whole)
        > 100 * tolerance
    )


@pytest.mark.slow
def test_engines_carry_the_same(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    losses = []
    for engine in ("torch", "deepspeed"):
        run = _loud(
            prepare(
                recipe,
                tmp_path / engine,
                *CARRY,
                "data.length=16",
                f"train.engine={engine}",
                "model.dropout=0",
            )
        )
        losses.append([train_step(run).loss for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_documents_are_forgotten_where_they_end(recipe: Path, tmp_path: Path) -> None:
    """That holds within a sequence and between two; else the state goes on through them."""
    masked = _loss(recipe, tmp_path, 6, "data.document_mask=true")
    assert abs(masked - _loss(recipe, tmp_path, 6)) > 1e-3


def _stop_and_go_on(rank: int, world: int, recipe: Path, folder: Path, *settings: str) -> None:
    common = (
        *CARRY,
        "train.steps=6",
        "train.micro_batch=3",
        "data.length=24",
        "train.eval_tokens=100",
        *settings,
    )
    train_run(recipe, folder / "whole", *common)
    train_run(recipe, folder / "stopped", *common, stop_at=3)
    train_run(recipe, folder / "stopped", *common)


@pytest.mark.parametrize(("world", "residual"), [(1, "pre"), (1, "reversible"), (2, "pre")])
def test_three_and_three_steps_are_six(
    world: int, residual: str, recipe: Path, tmp_path: Path
) -> None:
    settings = f"model.residual={residual}", "data.document_mask=true", "model.mixer.convolution=2"
    if world == 1:
        _stop_and_go_on(0, 1, recipe, tmp_path, *settings)
    else:
        run_distributed(_stop_and_go_on, world, recipe, tmp_path, *settings)
    whole = checkpoint_state(tmp_path / "whole")
    assert_same(checkpoint_state(tmp_path / "stopped"), whole)
    memory = whole["carried.blocks.1.memory"]
    assert memory.shape == (8, 2, 16, 8) and bool(memory.flatten(1).any(1).all())
    # Without what was carried, the run would have gone elsewhere.
    train_run(
        recipe,
        tmp_path / "forgetful",
        *CARRY,
        *settings,
        "train.steps=6",
        "data.length=24",
        "train.carry_state=false",
    )
    assert not torch.equal(
        checkpoint_state(tmp_path / "forgetful")["model.embedding.weight"],
        whole["model.embedding.weight"],
    )


# Of two ranks, each has every other lane.
_FEW_LANES = (
    *CARRY,
    "train.batch=4",
    "train.micro_batch=1",
    "train.steps=3",
    "data.length=16",
    "model.mixer.convolution=2",
)


def _train_few(rank: int, world: int, recipe: Path, folder: Path) -> None:
    train_run(recipe, folder, *_FEW_LANES)


def _load_few(rank: int, world: int, recipe: Path, folder: Path) -> dict[str, Any]:
    return load_whole(recipe, folder, *_FEW_LANES)


def test_lanes_move_to_another_number_of_ranks(recipe: Path, tmp_path: Path) -> None:
    """A run is saved on 2 ranks; of 3 one has no lane at all. What is carried is what one process
    carries.
    """
    run_distributed(_train_few, 2, recipe, tmp_path)
    train_run(recipe, tmp_path / "alone", *_FEW_LANES)
    saved, alone = checkpoint_state(tmp_path), checkpoint_state(tmp_path / "alone")
    for name, value in alone.items():
        if name.startswith("carried."):
            torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-5)
    for loaded in (
        load_whole(recipe, tmp_path, *_FEW_LANES),
        *run_distributed(_load_few, 3, recipe, tmp_path),
    ):
        names = [name for name in saved if name.startswith(("carried.", "model."))]
        assert "carried.blocks.0.memory" in names and "carried.blocks.1.recent.rows" in names
        assert_same({name: loaded[name] for name in names}, {name: saved[name] for name in names})


def test_an_epoch_begins_with_nothing(recipe: Path, tmp_path: Path) -> None:
    """The second epoch's first step sees what a run without a past would."""
    long = ("data.length=200", "train.batch=3")
    run = _loud(prepare(recipe, tmp_path / "run", *CARRY, *FROZEN, *long))
    steps = run.stream.samples_per_epoch // 3
    losses = [train_step(run).loss for _ in range(steps + 1)]
    without = ("train.carry_state=false", "data.order=contiguous")
    forgetful = _loud(prepare(recipe, tmp_path / "forgetful", *CARRY, *FROZEN, *long, *without))
    expected = [train_step(forgetful).loss for _ in range(steps + 1)]
    assert steps > 1 and losses[0] == expected[0] and losses[steps] == expected[steps]
    assert all(
        ours != theirs for ours, theirs in zip(losses[1:steps], expected[1:steps], strict=True)
    )


def test_a_skipped_step_leaves_no_trace(recipe: Path, tmp_path: Path) -> None:
    run = prepare(recipe, tmp_path, *CARRY)
    train_step(run)
    assert run.carried_states is not None
    before = {name: tensor.clone() for name, tensor in run.carried_states.tensors(None).items()}
    with dense_overflow(run):
        train_step(run)
    assert run.progress.skipped == 1
    assert_same(run.carried_states.tensors(None), before)
    train_step(run)
    assert not torch.equal(
        run.carried_states.tensors(None)["carried.blocks.0.memory"],
        before["carried.blocks.0.memory"],
    )


def _evaluated(run: Path, capfd: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    code = main(["eval", str(run), "--json", *options])
    printed: dict[str, Any] = json.loads(capfd.readouterr().out)
    return {**printed, "code": code}


def test_untruncated_evaluation_is_one_pass(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is one in training with carried states, and in the command on any model that can."""
    trained = train_run(recipe, tmp_path / "run", *CARRY, "data.length=16", "train.steps=5")
    loaded = load_model(tmp_path / "run")
    windows = held_out_windows(Path(loaded.recipe.data.path))
    inputs, targets = (torch.cat(parts, 1) for parts in zip(*windows, strict=True))
    with torch.no_grad():
        losses = token_losses(loaded.model(inputs)[0], targets).double()
    expected = float(losses.mean())
    assert trained["loss"] == pytest.approx(expected, rel=1e-6)
    capfd.readouterr()
    for batch in ("1", "7"):
        result = _evaluated(tmp_path / "run", capfd, "--untruncated", "--batch", batch)
        assert (
            result["code"] == 0
            and result["tokens"] == targets.numel()
            and result["loss"] == pytest.approx(expected, rel=1e-6)
        )
        last = result["by_position"][-1]
        assert (
            last["last"] == targets.numel() - 1 or last["tokens"] == targets.numel() - last["first"]
        )
        assert last["loss"] == pytest.approx(float(losses[0, last["first"] :].mean()), rel=1e-6)
    assert result["untruncated"] and not _evaluated(tmp_path / "run", capfd)["untruncated"]
    assert _evaluated(tmp_path / "run", capfd)["loss"] != pytest.approx(expected, rel=1e-6)
    assert (
        "leave one of them out"
        in _evaluated(tmp_path / "run", capfd, "--untruncated", "--stride", "1")["error"]
    )


def test_untruncated_evaluation_needs_states_of_constant_size(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=1")
    capfd.readouterr()
    result = _evaluated(tmp_path / "run", capfd, "--untruncated")
    assert result["code"] == 2 and "--untruncated is for linear and delta mixers" in result["error"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.mixer.kind=softmax",), "linear and delta mixers, .* and model.mixer has softmax"),
        (("model.mixer.pattern=[delta, lsh]",), "model.mixer has lsh"),
        (("model.position=learned",), "needs a model with model.position=none"),
        (("model.encoder_layers=2", "model.memory.layers=[]"), "model.encoder_layers is"),
        (("data.order=shuffled",), "data.order is shuffled: .* set data.order to contiguous"),
        (("data.order=best-fit",), "needs rows that go on, and data.order is best-fit"),
        (("parallel.tensor=2",), "parallel.tensor is 2: set it to 1"),
        (("train.segments=2", "train.chunk=8"), "leave out train.chunk, or train.segments"),
        (
            ("train.segments=2", "model.residual=reversible"),
            "leave out model.residual=reversible, or train.segments",
        ),
        (("train.segments=0",), "train.segments is 0"),
    ],
    ids=str,
)
def test_what_cannot_go_on_says_so(settings: tuple[str, ...], message: str, recipe: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe, (*CARRY, *settings))
