"""A step of 12 layers of 1,024 by 16k tokens launches few kernels, whatever its mixer."""

from dataclasses import replace

import pytest
import torch

from memshard.data_pipeline.stream.batch import Batch
from memshard.models.context import Context
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


def _refuse_capture(*overrides: str) -> dict[str, str]:
    """Return, for each block of a small model, why a graph of its forward and backward pass could
    not be replayed with other numbers: what waits, what is copied, what was launched once only.
    """
    recipe = load_recipe("wide", overrides)
    memory = replace(recipe.model.memory, layers=(1,), keys=8, heads=2, topk=3, key_dim=8)
    model = replace(recipe.model, layers=2, dim=32, vocab_size=50, memory=memory).for_length(32)
    random, reasons = torch.Generator().manual_seed(0), {}
    with fake_cuda() as watch:
        training = build_for_training(
            model, recipe.optimizer, recipe.tables, recipe.train, device="cuda"
        )
        ctx = Context.of(torch.zeros(2, 32, dtype=torch.int64).to("cuda"))
        for block in training.model.blocks:
            passes = []
            for _ in range(3):
                x = torch.randn(2, 32, 32, generator=random).to("cuda").requires_grad_()
                training.table_optimizer.zero_grad()
                with watch.counted() as counts, torch.autocast("cuda", torch.bfloat16):
                    block(x, ctx)[0].sum().backward()
                passes.append(counts)
            # The first one tests kernels and makes constants.
            _, first, second = passes
            assert first.launches
            changed = (first.launches - second.launches) + (second.launches - first.launches)
            asked = first.waits + first.blocking + first.copies + changed
            if asked:
                reasons[f"block {block.layer}"] = f"{asked}"
    return reasons


@pytest.mark.parametrize(
    "mixer",
    [
        "softmax",
        "delta",
        "lsh",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("local", "linear")),
    ],
)
def test_blocks_could_be_captured(mixer: str) -> None:
    """With and without a memory: nothing in them depends on a number of the device."""
    settings = (f"model.mixer.kind={mixer}", "model.mixer.heads=2", "model.mixer.window=8")
    assert not on_fake_cuda(_refuse_capture, *settings, "model.mixer.chunk=8")
