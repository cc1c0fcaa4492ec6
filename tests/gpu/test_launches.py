"""A step of 12 layers of 1,024 by 16k tokens launches few kernels, whatever its mixer."""

from dataclasses import replace

import pytest
import torch

from memshard.data_pipeline.stream.batch import Batch
from memshard.trainer.config.load import load_recipe
from memshard.trainer.tasks.language_model import LanguageModelTask
from memshard.trainer.training import build_for_training, training_step
from tests.gpu.fake_cuda import Counts, fake_cuda, on_fake_cuda


def _step(*overrides: str) -> Counts:
    """Return what the second step of recipe `wide` asks of the device."""
    recipe = load_recipe("wide", overrides)
    rows, length = recipe.train.batch, recipe.data.length
    model = replace(recipe.model, vocab_size=32768).for_length(length)
    tokens, positions = torch.zeros(2, rows, length, dtype=torch.int64), torch.arange(length)
    batch = Batch(tokens[0], tokens[1], tokens[0], positions.expand(rows, -1), torch.arange(rows))
    with fake_cuda(computed=4096) as watch:
        training = build_for_training(
            model, recipe.optimizer, recipe.tables, recipe.train, device="cuda"
        )
        task = LanguageModelTask(training.device, document_mask=False, seed=0)
        for step in range(2):
            with watch.counted() as counts:
                training_step(training, [batch], task.loss, step)
    return counts


@pytest.mark.parametrize(
    ("mixer", "most"),
    [
        ("softmax", 750),
        pytest.param("delta", 1500, marks=pytest.mark.slow),
        pytest.param("lsh", 3000, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_12_layers(mixer: str, most: int) -> None:
    counts = on_fake_cuda(_step, f"model.mixer.kind={mixer}")
    assert counts.launches.total() <= most, counts.launches.most_common(40)
    assert counts.waits.total() == 1 and not counts.blocking, counts


def test_a_mixer_casts_its_input_once() -> None:
    """Under autocast, which casts every weight as well; so does a feedforward."""
    one, two = (
        on_fake_cuda(_step, f"model.layers={layers}", "model.memory.layers=[]").launches
        for layers in (1, 2)
    )
    casts = {key: n for key, n in (two - one).items() if key[0] == "_to_copy"}
    # Forward and backward: of 4 and 2 weights, of two inputs; the gradients of two results.
    assert sum(casts.values()) == 2 * (4 + 2) + 2 * 2 + 2, casts
