"""What an n-gram memory adds to a step of a model, and whether that grows with its table.

    OMP_NUM_THREADS=1 memshard bench ngram data/pkm --rows 8192,65536,2097152

All models train on the same tokens in one process, in turns; inference is a forward pass of the
same batch.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memshard.bench.common.sizes import add_sizes
from memshard.experiments.common.clock import interleave, now
from memshard.experiments.common.repeated import median_low_high, range_text, ratios
from memshard.models.config import MixerConfig, ModelConfig, NgramConfig
from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.config.recipe import DataConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.evaluation.slot_usage import in_evaluation
from memshard.trainer.run import Run
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step

_WITHOUT = "without"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("data", metavar="DIR", help="data folder to train on")
    add_sizes(parser)
    parser.add_argument(
        "--rows", default="8192,65536", help="of each order's and head's table, by commas"
    )
    parser.add_argument("--memory-heads", type=int, default=4, help="tables of an order")
    parser.add_argument("--value-dim", type=int, default=32, help="width of a row")
    parser.add_argument("--layer", type=int, default=1, help="the layer with the memory")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return, for each table, its number of rows, and the times of training steps and forward
    passes over those of the model without it, round by round: median, low and high.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(
        data=DataConfig(path=args.data, length=args.length),
        model=ModelConfig(layers=args.layers, dim=args.dim, mixer=MixerConfig(heads=args.heads)),
        train=TrainConfig(steps=args.rounds + 1, batch=args.batch),
        optimizer=OptimizerConfig(warmup=1),
    )
    settings = [
        NgramConfig(
            layers=(args.layer,),
            heads=args.memory_heads,
            rows=int(rows),
            value_dim=args.value_dim,
        )
        for rows in args.rows.split(",")
    ]
    with tempfile.TemporaryDirectory() as folder:
        runs = {_WITHOUT: set_up(recipe, Path(folder) / _WITHOUT, device)}
        for ngram in settings:
            model = replace(recipe.model, ngram=ngram)
            with_memory = replace(recipe, model=model)
            name = f"{ngram.rows:,} rows a table"
            runs[name] = set_up(with_memory, Path(folder) / str(ngram.rows), device)
        clock = partial(now, device)
        training = interleave(
            {name: partial(train_step, run) for name, run in runs.items()}, args.rounds, clock
        )
        forward = interleave(
            {name: _forward(run, args.batch) for name, run in runs.items()}, args.rounds, clock
        )
    tables = {
        name: {
            "slots": next(memory.values.slots for _, memory in run.model.ngrams()),
            "training": median_low_high(ratios(training[name], training[_WITHOUT])),
            "inference": median_low_high(ratios(forward[name], forward[_WITHOUT])),
        }
        for name, run in runs.items()
        if name != _WITHOUT
    }
    names = list(tables)
    return {
        "seconds a step without": median_low_high(training[_WITHOUT]),
        "tables": tables,
        "largest over smallest, training": median_low_high(
            ratios(training[names[-1]], training[names[0]])
        ),
    }


def _forward(run: Run, batch: int) -> Callable[[], object]:
    inputs = run.stream.batch(0, batch).inputs.to(run.device)

    @torch.no_grad()
    def forward() -> None:
        with in_evaluation(run.model):
            run.model(inputs)

    return forward


def show(result: dict[str, Any]) -> None:
    """Print the ratios."""
    print(f"a step without: {range_text(result['seconds a step without'], '.2f')} s")
    for name, table in result["tables"].items():
        print(
            f"{name}, {table['slots']:,} in all: training {range_text(table['training'], '.3f')}, "
            f"inference {range_text(table['inference'], '.3f')} of the model without"
        )
    print(
        "largest over smallest table, training: "
        f"{range_text(result['largest over smallest, training'], '.3f')}"
    )
