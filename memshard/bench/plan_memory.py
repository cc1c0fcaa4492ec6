"""How well `memshard plan` predicts memory: the estimate of a training step's largest memory beside
what a fresh process really grows by.

    OMP_NUM_THREADS=1 memshard bench plan-memory

Each recipe is set up and takes three steps on random tokens in a process of its own. On CPU its
resident memory is read every 2 ms from the moment before the model is built (a small model has
trained before, for what torch sets up once); on a GPU torch counts.
"""

import argparse
import threading

import torch

from memshard.bench.common.peak_memory import freed_at_once, in_new_process, resident
from memshard.models.config import FeedForwardConfig, MemoryConfig, MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.initialize import initialize
from memshard.models.loss import token_losses
from memshard.models.memory.table import find_tables
from memshard.models.random import RandomKey
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.transformer import Transformer
from memshard.parallel.apply import apply
from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.config.recipe import DataConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.alternatives import changed_by
from memshard.trainer.cost.estimate import estimate
from memshard.trainer.engine.native import NativeEngine
from memshard.trainer.optim.dense.schedule import learning_rate
from memshard.trainer.optim.rows.adam import RowAdam
from memshard.trainer.precision import DTYPES, autocast, store_tables

VOCABULARY = 8192
_MEMORY = MemoryConfig(layers=(2,), keys=256, heads=4, topk=16, key_dim=128)
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
    small = {
        "train.batch": 1,
        "train.micro_batch": None,
        "model.dim": 48,
        "model.layers": 3,
        "data.length": 16,
    }
    _train(changed_by(recipe, small), device, precision)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _train(recipe, device, precision)
        return float(torch.cuda.max_memory_allocated() - before)
    before = peak = resident("VmRSS") or 0
    over = threading.Event()

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


def _train(recipe: Recipe, name: str, precision: str) -> None:
    device, dtype, length = torch.device(name), DTYPES[precision], recipe.data.length
    config = changed_by(recipe, {"model.vocab_size": VOCABULARY, "model.max_length": length}).model
    with torch.device("meta"):
        model = Transformer(config)
    apply(model, None)
    store_tables(model, recipe.tables.dtype)
    model.to_empty(device=device)
    initialize(model, 0)
    model.configure(Recompute(recipe.train.checkpointing, recipe.train.chunk))
    engine = NativeEngine(model, OptimizerConfig(), None, {})
    for _, memory in model.memories():
        memory.query_norm.deferred = True
    tables = [table for _, table in find_tables(model)]
    rows = RowAdam(tables, 1e-3, rounding=recipe.tables.rounding) if tables else None
    size = recipe.train.micro_batch or recipe.train.batch
    for step in range(3):
        for first in range(0, recipe.train.batch, size):
            tokens = torch.randint(VOCABULARY, (size, length), device=device)
            numbers = torch.arange(first, first + size, device=device)
            ctx = Context(
                torch.arange(length, device=device).expand(size, -1),
                random=RandomKey(0, step, numbers),
            )
            with autocast(dtype, device):
                loss = token_losses(model(tokens, ctx)[0], tokens).sum() / (
                    recipe.train.batch * length
                )
            engine.backward(loss, 1.0)
        rate = learning_rate(engine.config, step, 100)
        engine.step(rate, engine.gradient_norm(1.0), 1.0, 1.0)
        if rows is not None:
            rows.step()
        for _, memory in model.memories():
            memory.query_norm.commit()
