"""Measure how well `memshard plan` predicts memory: its estimate for a training step against the
growth of a new process.

    OMP_NUM_THREADS=1 memshard bench plan-memory

Each recipe is set up and takes three steps on random tokens in a process of its own. On CPU its
resident memory is read every 2 ms from the moment before the model is built (a small model has
trained before, for what torch sets up once); on a GPU torch counts.
"""

import argparse
import threading

import torch
from torch import Tensor, nn

from memshard.bench.common.peak_memory import freed_at_once, in_new_process, resident
from memshard.models.config import (
    FeedForwardConfig,
    MemoryConfig,
    MixerConfig,
    ModelConfig,
    NgramConfig,
)
from memshard.models.context import Context
from memshard.models.loss import token_losses
from memshard.models.random import RandomKey
from memshard.trainer.config.recipe import DataConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.alternatives import changed_by
from memshard.trainer.cost.estimate import estimate
from memshard.trainer.precision import DTYPES
from memshard.trainer.training import build_for_training, training_step

VOCABULARY = 8192
_MEMORY = MemoryConfig(layers=(2,), keys=256, heads=4, topk=16, key_dim=128)
_NGRAM = NgramConfig(layers=(0, 2), rows=4096, value_dim=24)
_MODEL = ModelConfig(layers=6, dim=384, mixer=MixerConfig(heads=6))
_BASE = Recipe(data=DataConfig(path="", length=256), model=_MODEL, train=TrainConfig(batch=16))

RECIPES = {
    "dense": _BASE,
    "memory": changed_by(_BASE, {"model.memory": _MEMORY}),
    "memory, full checkpointing, micro-batches": changed_by(
        _BASE, {"model.memory": _MEMORY, "train.checkpointing": "full", "train.micro_batch": 8}
    ),
    "memory, reversible, 12 layers": changed_by(
        _BASE, {"model.memory": _MEMORY, "model.residual": "reversible", "model.layers": 12}
    ),
    "memory, fp16 table, swiglu, rms": changed_by(
        _BASE,
        {
            "model.memory": MemoryConfig(
                layers=(2,), keys=512, heads=4, topk=16, key_dim=128, query_norm="rms"
            ),
            "model.feedforward": FeedForwardConfig(activation="swiglu"),
            "model.norm": "rms",
            "tables.dtype": "fp16",
            "tables.rounding": "stochastic",
        },
    ),
    "n-grams in two layers": changed_by(_BASE, {"model.ngram": _NGRAM}),
    "memory and n-grams, full checkpointing": changed_by(
        _BASE, {"model.memory": _MEMORY, "model.ngram": _NGRAM, "train.checkpointing": "full"}
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=[*DTYPES], default="fp32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--recipes", type=int, default=len(RECIPES), help="only the first so many")


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return bytes estimated and measured, by recipe."""
    rows = {}
    for name, recipe in list(RECIPES.items())[: args.recipes]:
        recipe = changed_by(recipe, {"train.batch": args.batch})
        # --precision has no "auto": whatever is not fp32 is a half precision.
        estimated = estimate(recipe, 1, VOCABULARY, args.precision != "fp32").bytes.total
        with freed_at_once():
            measured = in_new_process(measure, recipe, args.device, args.precision)
        rows[name] = {"estimated": estimated, "measured": measured}
    return rows


def show(result: dict[str, dict[str, float]]) -> None:
    """Print a line for each recipe."""
    print(f"{'':44}{'estimated':>11}{'measured':>11}{'ratio':>8}")
    for name, row in result.items():
        estimated, measured = row["estimated"], row["measured"]
        print(
            f"{name:44}{estimated / 1e6:8.1f} MB{measured / 1e6:8.1f} MB{estimated / measured:8.3f}"
        )


def measure(recipe: Recipe, device: str, precision: str) -> float:
    """Return the bytes that setting up and three steps take at most."""
    torch.set_num_threads(1)
    # Three layers, since the memory is in layer 2, and 48 channels, since 6 heads divide them: as
    # small as the recipe allows, with all its kinds of layers.
    small = {
        "train.batch": 1,
        "train.micro_batch": None,
        "model.dim": 48,
        "model.layers": 3,
        "data.length": 16,
    }
    _train(changed_by(recipe, small), device, precision)
    if device != "cpu":
        # torch counts tensors: neither CUDA's context nor the allocator's unused blocks, which the
        # plan leaves out as well.
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _train(recipe, device, precision)
        return float(torch.cuda.max_memory_allocated() - before)
    before = peak = resident("VmRSS") or 0
    over = threading.Event()

    # Sampled: VmHWM cannot be used, since the small training and the imports may have set it.
    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, resident("VmRSS") or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _train(recipe, device, precision)
    over.set()
    watcher.join()
    return float(peak - before)


def _train(recipe: Recipe, device: str, precision: str) -> None:
    length, batch = recipe.data.length, recipe.train.batch
    recipe = changed_by(
        recipe,
        {
            "model.vocab_size": VOCABULARY,
            "model.max_length": length,
            # More than the three steps taken, so that the schedule does not end.
            "train.steps": 100,
            "train.precision": precision,
        },
    )
    training = build_for_training(
        recipe.model, tables=recipe.tables, train=recipe.train, device=device
    )

    def loss(model: nn.Module, numbers: Tensor) -> Tensor:
        # Made here: neither a data set nor a stream takes memory.
        tokens = torch.randint(VOCABULARY, (len(numbers), length), device=device)
        positions = torch.arange(length, device=device).expand(len(numbers), -1)
        ctx = Context(positions, random=RandomKey(0, step, numbers))
        return token_losses(model(tokens, ctx)[0], tokens).sum() / (batch * length)

    for step in range(3):
        # A micro-batch is the numbers of its samples: `loss` makes the tokens, and dropout's keys
        # are drawn by sample number.
        samples = torch.arange(batch, device=device)
        training_step(training, samples.split(recipe.train.micro_batch or batch), loss, step)
