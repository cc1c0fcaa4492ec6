"""Copying 0w0w (Kitaev et al. 2020, section 5 and table 2): how well a model trained with some
rounds of LSH copies with other numbers of rounds.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.experiments.common.catalogue import Experiment, Point, Scale
from memshard.experiments.common.curves import lines
from memshard.experiments.common.repeated import mean_deviation, seeds
from memshard.models.config import FeedForwardConfig, MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.initialize import initialize
from memshard.models.mixers.kinds import bucket_count
from memshard.models.mixers.lsh import LSHMixer
from memshard.models.random import RandomKey
from memshard.models.transformer import Transformer
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.training import build_for_training, training_step

_SYMBOLS = 127
_TRAINED = ["full", "4", "2", "1"]
_EVALUATED = ["full", "8", "4", "2", "1"]
_PUBLISHED = {
    "full": [100, 94.8, 92.5, 76.9, 52.5],
    "4": [0.8, 100, 99.9, 99.4, 91.9],
    "2": [0.8, 100, 99.9, 98.1, 86.8],
    "1": [0.8, 99.9, 99.6, 94.8, 77.9],
}
_SEEDS: dict[Scale, int] = {"smoke": 1, "small": 3, "full": 1}
_SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"words": 7, "chunk": 2, "dim": 32, "heads": 2, "batch": 16, "steps": 20},
    "small": {"words": 63, "chunk": 8, "dim": 128, "heads": 4, "batch": 64, "steps": 1500},
    "full": {"words": 511, "chunk": 32, "dim": 256, "heads": 4, "batch": 64, "steps": 150_000},
}


def sample_copies(words: int, batch: int, random: torch.Generator) -> Tensor:
    """Draw sequences 0w0w, [batch, 2 words + 2] int64, with w of the symbols 1 to 127."""
    w = torch.randint(1, _SYMBOLS + 1, (batch, words), generator=random)
    return F.pad(w, (1, 0)).repeat(1, 2)


def train(point: dict[str, Any]) -> dict[str, Any]:
    """Train one layer with the attention point["attention"], and return the percentage of the
    second half's symbols that it predicts with each kind of attention: "full", or LSH with that
    many rounds.
    """
    words, heads = point["words"], point["heads"]
    config = ModelConfig(
        vocab_size=_SYMBOLS + 1,
        layers=1,
        dim=point["dim"],
        max_length=2 * words + 2,
        tie_head=False,
        mixer=MixerConfig(kind="lsh", heads=heads, chunk=point["chunk"], resample=True),
        feedforward=FeedForwardConfig(activation="relu", hidden=point["dim"]),
    )
    model = Transformer(config)
    initialize(model, point["seed"])
    with torch.no_grad():
        for name in ("embedding", "positions"):
            # What a token looks for depends on its position alone: positions start as large as
            # the embedding, or they would hardly show in the normalised input.
            model.get_submodule(name).weight.normal_(  # type: ignore[operator]
                generator=torch.Generator().manual_seed(point["seed"])
            )
    training = build_for_training(
        model,
        lambda parameters: torch.optim.Adam(parameters, point["lr"], (0.9, 0.98)),
        train=TrainConfig(precision="fp32", clip=0.0),
    )
    training.learning_rate = lambda step: point["lr"] * min(1.0, (step + 1) / 200)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
        ctx = Context(positions, random=RandomKey(point["seed"], step, torch.arange(len(tokens))))
        losses: Tensor = model(tokens[:, :-1], ctx, targets=tokens[:, 1:])[0]
        # Only the second half can be predicted; the first is random.
        return losses[:, words + 1 :].mean()

    random = torch.Generator().manual_seed(point["seed"])
    attend(model, point["attention"], point)
    curve = []
    for step in range(point["steps"]):
        tokens = sample_copies(words, point["batch"], random)
        outcome = training_step(training, [tokens], loss, step)
        if (step + 1) % 100 == 0:
            curve.append((step + 1, outcome.loss))
    return {kind: _accuracy(model, kind, point) for kind in _EVALUATED} | {"curve": curve}


def attend(model: Transformer, kind: str, point: dict[str, Any]) -> None:
    """Set the model's attention: LSH with int(kind) rounds, or "full", all earlier tokens with the
    same shared queries and keys.
    """
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, LSHMixer)
    full = kind == "full"
    length, chunk = 2 * point["words"] + 2, point["chunk"]
    mixer.buckets, mixer.chunk, mixer.rounds = (
        (1, length, 1) if full else (bucket_count(length, chunk), chunk, int(kind))
    )


@torch.no_grad()
def _accuracy(model: Transformer, kind: str, point: dict[str, Any]) -> float:
    attend(model.eval(), kind, point)
    tokens = sample_copies(point["words"], 256, torch.Generator().manual_seed(1_000_003))
    right = model(tokens[:, :-1])[0].argmax(-1) == tokens[:, 1:]
    model.train()
    return 100 * float(right[:, point["words"] + 1 :].double().mean())


def _points(scale: Scale) -> list[Point]:
    points = [
        {"attention": kind, "lr": 2e-3 if scale != "full" else 5e-4, "seed": seed, **_SIZES[scale]}
        for seed in range(1, _SEEDS[scale] + 1)
        for kind in _TRAINED
    ]
    for point in points:
        if scale == "small" and point["attention"] in ("2", "1"):
            point["steps"] = 4500  # after 1,500 they were still learning
    return points


def _report(rows: list[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    by_training: dict[str, list[dict[str, Any]]] = {}
    for point, result in rows:
        by_training.setdefault(point["attention"], []).append(result)
    steps = {point["attention"]: point["steps"] for point, _ in rows}
    text = (
        "Percentage of the second half predicted, in brackets the published one (length 1024, "
        "150,000 steps); here length "
    )
    text += f"{2 * point['words'] + 2}, batches of {point['batch']}, width {point['dim']}, "
    text += f"chunk {point['chunk']}; {seeds(len(by_training['full']))}.\n\n"
    text += f"| trained with | steps | {' | '.join(map(_name, _EVALUATED))} |\n"
    text += f"|---|---|{'---|' * len(_EVALUATED)}\n"
    for kind, results in by_training.items():
        cells = [
            f"{mean_deviation([result[other] for result in results], '.1f')} ({published:g})"
            for other, published in zip(_EVALUATED, _PUBLISHED[kind], strict=True)
        ]
        text += f"| {_name(kind)} | {steps[kind]:,} | {' | '.join(cells)} |\n"
    rounds = [int(other) for other in reversed(_EVALUATED) if other != "full"]
    copied = {
        f"trained with {_name(kind)}": {n: [result[str(n)] for result in results] for n in rounds}
        for kind, results in by_training.items()
    }
    published = {
        f"trained with {_name(kind)}": dict(zip(reversed(rounds), of[1:], strict=True))
        for kind, of in _PUBLISHED.items()
    }
    lines(
        copied,
        published,
        folder / "duplication.png",
        "rounds of LSH in evaluation",
        "predicted, %",
        logarithmic="x",
    )
    return text + "\n![percentage predicted against rounds in evaluation](duplication.png)\n"


def _name(kind: str) -> str:
    return "full" if kind == "full" else f"LSH-{kind}"


EXPERIMENT = Experiment(
    what="duplication 0w0w: trained with full attention or 1, 2, 4 rounds of LSH, evaluated with "
    "full, 1, 2, 4, 8 (table 2)",
    points=_points,
    run=train,
    report=_report,
    hours={"smoke": 0.01, "small": 1.2, "full": 400.0},
)
