"""Masked tokens: what is hidden, and that a small encoder with a memory finds it."""

import json
from pathlib import Path

import pytest
import torch

from memshard.data_pipeline.stream.batch import IGNORE, Batch
from memshard.launch.cli.main import main
from memshard.trainer.tasks.masked_tokens import MASK, MaskedTokenTask
from tests.trainer.tiny_run import RECIPE, assert_same, checkpoint_state, numbers, train_run


def _batch(rows: int, length: int) -> Batch:
    tokens = torch.randint(2, 100, (rows, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).repeat(rows, 1)
    return Batch(
        tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), positions, torch.arange(rows)
    )


def test_of_the_tokens_to_be_found_8_in_10_are_hidden_and_1_in_10_replaced() -> None:
    task = MaskedTokenTask(torch.device("cpu"), 3, 0.15, 100)
    batch = _batch(200, 100)
    inputs, targets, _ = task.hidden(batch, 7)
    predicted = targets != IGNORE
    assert (predicted.sum(1) == 15).all() and torch.equal(
        targets[predicted], batch.inputs[predicted]
    )
    assert torch.equal(inputs[~predicted], batch.inputs[~predicted])
    hidden, same = (
        (inputs[predicted] == MASK).float().mean(),
        (inputs[predicted] == targets[predicted]).float().mean(),
    )
    assert abs(hidden - 0.8) < 0.03 and abs(same - 0.101) < 0.03
    assert predicted.float().mean(0).std() < 0.06, "no place is preferred"


def test_draws_depend_on_step_and_sample_and_not_on_the_batch() -> None:
    task = MaskedTokenTask(torch.device("cpu"), 3, 0.15, 100)
    batch = _batch(8, 40)
    inputs = task.hidden(batch, 7)[0]
    half = Batch(*(field[4:] for field in batch))
    assert torch.equal(task.hidden(half, 7)[0], inputs[4:]) and not torch.equal(
        task.hidden(batch, 8)[0], inputs
    )
    assert torch.equal(task.hidden(batch, None)[0], task.hidden(batch, None)[0])


def test_padding_is_never_to_be_found() -> None:
    task = MaskedTokenTask(torch.device("cpu"), 3, 0.5, 100)
    batch = _batch(3, 10)
    batch.targets[0, 4:] = batch.targets[1] = IGNORE
    counted = task.counted(batch)
    assert counted.sum(1).tolist() == [2, 0, 5] and not counted[0, 4:].any()


@pytest.fixture(scope="session")
def masked_recipe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "masked.yaml"
    path.write_text(
        RECIPE.format(data=data).replace("layers: 2\n", "layers: 2\n  encoder_layers: 2\n")
    )
    return path


@pytest.mark.parametrize("mixer", ["softmax", "linear"])
def test_an_encoder_with_a_memory_resumes_and_learns(
    masked_recipe: Path, tmp_path: Path, mixer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = f"model.mixer.kind={mixer}", "train.steps=60", "train.eval_every=60"
    whole = train_run(masked_recipe, tmp_path / "whole", *settings)
    train_run(masked_recipe, tmp_path / "parts", *settings, stop_at=31)
    train_run(masked_recipe, tmp_path / "parts", *settings)
    assert_same(checkpoint_state(tmp_path / "whole"), checkpoint_state(tmp_path / "parts"))
    losses = numbers(tmp_path / "whole", "train/loss")
    assert 5 < losses[1] < 6.5 and whole["loss"] < losses[1] - 0.5
    capfd.readouterr()
    assert main(["eval", str(tmp_path / "whole"), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (
        result["loss"] == pytest.approx(whole["loss"])
        and 0.05 < result["accuracy"] < 1
        and "bits_per_byte" not in result
    )
