"""Primer's parts one by one (So et al. 2021, section 4): which of them lower the loss of a small
model of bytes, at equal parameters.

The text is the source of Python's standard library, which every machine has; every tenth file is
held out.
"""

import math
import statistics
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memshard.experiments.common.catalogue import Experiment, Point, Scale
from memshard.experiments.common.clock import now
from memshard.experiments.common.repeated import mean_deviation, median_range, ratios
from memshard.models.initialize import initialize
from memshard.models.layers.linear import INIT_STD
from memshard.models.transformer import Transformer
from memshard.trainer.config.load import load_recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.evaluation.canvas import COLORS, canvas, clean
from memshard.trainer.training import build_for_training, training_step

_BYTES = 256
_HELD_OUT = 10
ARMS: dict[str, tuple[str, ...]] = {
    "vanilla": ("transformer",),
    "GELU": ("transformer-gelu",),
    "squared ReLU": ("transformer", "model.feedforward.activation=squared_relu"),
    "MDHA": ("transformer", "model.mixer.convolution=3"),
    "Transformer++": ("transformer-pp",),
    "Primer-EZ": ("primer-ez",),
    "Primer": ("primer",),
}
"""The recipe of each model, and what is changed in it."""
_CLAIMS = [
    ("vanilla", "GELU"),
    ("GELU", "squared ReLU"),
    ("vanilla", "MDHA"),
    ("vanilla", "Transformer++"),
    ("squared ReLU", "Primer-EZ"),
    ("MDHA", "Primer-EZ"),
    ("Transformer++", "Primer-EZ"),
]
"""Pairs (worse, better), as the paper orders them."""
_SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {
        "layers": 1,
        "dim": 32,
        "heads": 2,
        "length": 32,
        "batch": 4,
        "steps": 20,
        "lr": 1e-3,
        "every": 10,
        "windows": 8,
    },
    "small": {
        "layers": 2,
        "dim": 128,
        "heads": 4,
        "length": 128,
        "batch": 8,
        "steps": 600,
        "lr": 1e-3,
        "every": 50,
        "windows": 128,
    },
    "full": {
        "layers": 6,
        "dim": 512,
        "heads": 8,
        "length": 64,
        "batch": 64,
        "steps": 100_000,
        "lr": 1e-3,
        "every": 2000,
        "windows": 1024,
    },
}
_SEEDS: dict[Scale, int] = {"smoke": 1, "small": 5, "full": 3}
_ROUNDS: dict[Scale, int] = {"smoke": 2, "small": 31, "full": 31}


def run_point(point: dict[str, Any]) -> dict[str, Any]:
    """Run a point: one with "clock" compares times, any other is a training run."""
    return time_arms(point) if "clock" in point else train(point)


def train(point: dict[str, Any]) -> dict[str, Any]:
    """Train the model point["arm"]; return its held-out loss in nats a byte, its number of
    parameters, and the curve of (step, loss).
    """
    arm = _Arm(point, point["arm"])
    inside = torch.arange(point["length"] + 1)
    _, held_out = source_bytes()
    # Spread evenly over the held-out text: the first ones would be of one module.
    windows = held_out[
        torch.linspace(0, len(held_out) - len(inside), point["windows"]).long()[:, None] + inside
    ].to(arm.device)
    curve = []
    for step in range(point["steps"]):
        arm.step(step)
        if (step + 1) % point["every"] == 0:
            curve.append((step + 1, _loss(arm.model, windows)))
    return {
        "loss": curve[-1][1],
        "parameters": sum(parameter.numel() for parameter in arm.model.parameters()),
        "curve": curve,
    }


def time_arms(point: dict[str, Any]) -> dict[str, Any]:
    """Time training steps of all arms in turn: return arm -> microseconds a byte, a number a round.

    A round before the others does not count.
    """
    arms = {name: _Arm(point, name) for name in ARMS}
    spent: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(point["clock"] + 1):
        for name, arm in arms.items():
            begun = now(arm.device)
            arm.step(turn)
            if turn:
                spent[name].append(
                    (now(arm.device) - begun) / (point["batch"] * point["length"]) * 1e6
                )
    return spent


class _Arm:
    """A model in training. point: its sizes, steps and seed; name: one of ARMS."""

    def __init__(self, point: dict[str, Any], name: str) -> None:
        dim = point["dim"]
        sizes = [
            f"model.layers={point['layers']}",
            f"model.dim={dim}",
            f"model.mixer.heads={point['heads']}",
        ]
        sizes += [
            f"model.vocab_size={_BYTES}",
            # SwiGLU has three matrices where the others have two: 8/3 of the width
            # gives equal parameters.
            f"model.feedforward.hidden={dim * 8 // 3 if name == 'Transformer++' else dim * 4}",
        ]
        schedule = [
            f"optimizer.lr={point['lr']}",
            f"optimizer.warmup={point['steps'] // 12}",
            "optimizer.schedule=constant",
        ]
        bundled, *changes = ARMS[name]
        self.point, self.recipe = point, load_recipe(bundled, [*changes, *sizes, *schedule])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = Transformer(self.recipe.model).to(self.device)
        initialize(self.model, point["seed"])
        with torch.no_grad():
            for matrix in (
                parameter for parameter in self.model.parameters() if parameter.ndim > 1
            ):
                # N(0, 1 / inputs) as in the paper: at this width a deviation of 0.02 leaves hidden
                # activations so small that GELU is nearly linear.
                matrix.mul_(matrix.shape[1] ** -0.5 / INIT_STD)
        train = TrainConfig(steps=point["steps"], precision="fp32", clip=1.0)
        self.training = build_for_training(
            self.model, self.recipe.optimizer, train=train, device=self.device
        )
        # Of the seed alone: all models of a seed train on the same windows in the same order.
        self.draw = torch.Generator().manual_seed(point["seed"])

    def step(self, number: int) -> None:
        """Take a training step on windows drawn at random."""
        point, (text, _) = self.point, source_bytes()
        inside = torch.arange(point["length"] + 1)
        first = torch.randint(len(text) - len(inside), (point["batch"], 1), generator=self.draw)
        tokens = text[first + inside].to(self.device)
        training_step(
            self.training,
            [tokens],
            lambda model, tokens: model(tokens[:, :-1], targets=tokens[:, 1:])[0].mean(),
            number,
        )


@cache
def source_bytes() -> tuple[Tensor, Tensor]:
    """Return the bytes of the standard library's modules without its packages, int64: those to
    train on, and those held out.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    # Whole files: lines beside each other are too much alike for some to be held out.
    held_out = files[::_HELD_OUT]
    parts = [file for file in files if file not in held_out], held_out
    first, second = (b"".join(file.read_bytes() for file in part) for part in parts)
    # bytearray: torch warns of tensors in memory that cannot be written.
    return torch.frombuffer(bytearray(first), dtype=torch.uint8).long(), torch.frombuffer(
        bytearray(second), dtype=torch.uint8
    ).long()


@torch.no_grad()
def _loss(model: Transformer, windows: Tensor) -> float:
    return float(
        torch.cat(
            [model(part[:, :-1], targets=part[:, 1:])[0] for part in windows.split(32)]
        ).mean()
    )


def reached(curve: list[Any], target: float) -> float | None:
    """Return the step at which a curve of (step, loss), taken as its lowest loss so far, reaches a
    loss, interpolated between points; None where it does not.
    """
    place, lowest = 0.0, math.inf
    for step, loss in curve:
        if loss <= target:
            # The first point has none before it to interpolate from.
            share = 1.0 if lowest == math.inf else (lowest - target) / (lowest - loss)
            return float(place + share * (step - place))
        place, lowest = step, min(lowest, loss)
    return None


def _points(scale: Scale) -> list[Point]:
    trainings = [
        {"arm": arm, "seed": seed, **_SIZES[scale]} for seed in range(_SEEDS[scale]) for arm in ARMS
    ]
    return [*trainings, {"clock": _ROUNDS[scale], "seed": 0, **_SIZES[scale]}]


def _report(rows: list[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for point, result in rows:
        if "clock" not in point:
            by_arm.setdefault(point["arm"], []).append(result)
    clock, times = next(row for row in rows if "clock" in row[0])
    seeds = len(by_arm["vanilla"])
    text = (
        f"Bytes of Python's standard library, {clock['layers']} layers of width {clock['dim']}, "
        f"{clock['steps']:,} steps of "
        f"{clock['batch']} x {clock['length']}, {seeds} seeds. Loss: nats a held-out byte, mean "
        "and standard deviation. Gain: over "
        "vanilla, seed by seed. Time of a step: over vanilla's, median of interleaved rounds "
        "(range). Faster: vanilla's steps, or its "
        "time, over what a model takes to vanilla's last loss, median of seeds.\n\n"
        "| model | parameters | loss | gain | time of a step | faster, steps | faster, time "
        "|\n|---|---|---|---|---|---|---|\n"
    )
    for arm, results in by_arm.items():
        losses = [result["loss"] for result in results]
        gains = [base["loss"] - loss for base, loss in zip(by_arm["vanilla"], losses, strict=True)]
        slower = ratios(times[arm], times["vanilla"])
        cells = [
            arm,
            f"{results[0]['parameters']:,}",
            mean_deviation(losses, ".4f"),
            mean_deviation(gains, "+.4f") if arm != "vanilla" else "",
        ]
        cells.append(median_range(slower, ".2f"))
        factor = _factor(by_arm["vanilla"], results)
        cells += [
            f"{factor / ratio:.2f}" if factor else "not reached"
            for ratio in (1.0, statistics.median(slower))
        ]
        text += f"| {' | '.join(cells)} |\n"
    text += "\n| worse | better | seeds in which it is | mean difference |\n|---|---|---|---|\n"
    for worse, better in _CLAIMS:
        differences = [
            a["loss"] - b["loss"] for a, b in zip(by_arm[worse], by_arm[better], strict=True)
        ]
        wins = sum(difference > 0 for difference in differences)
        text += (
            f"| {worse} | {better} | {wins} of {seeds} | {mean_deviation(differences, '+.4f')} |\n"
        )
    _draw(by_arm, folder / "parts.png")
    return text + "\n![held-out loss by step](parts.png)\n"


def _factor(vanilla: list[dict[str, Any]], results: list[dict[str, Any]]) -> float:
    """Return how many times fewer steps reach the vanilla model's last loss: the median over seeds,
    where a seed that does not reach it counts as 0.
    """
    needed = [
        (base["curve"][-1][0], reached(result["curve"], base["loss"]))
        for base, result in zip(vanilla, results, strict=True)
    ]
    return statistics.median(total / taken if taken else 0.0 for total, taken in needed)


def _draw(by_arm: dict[str, list[dict[str, Any]]], file: Path) -> None:
    figure = canvas(8, 4.5)
    axes = figure.subplots()
    clean(axes)
    for color, (arm, results) in zip(COLORS, by_arm.items(), strict=False):
        steps = [row[0] for row in results[0]["curve"]]
        losses = [[result["curve"][place][1] for result in results] for place in range(len(steps))]
        axes.plot(
            steps,
            [statistics.mean(of_seeds) for of_seeds in losses],
            color=color,
            linewidth=1.8,
            label=arm,
        )
        axes.fill_between(
            steps,
            [min(of_seeds) for of_seeds in losses],
            [max(of_seeds) for of_seeds in losses],
            color=color,
            alpha=0.12,
            linewidth=0,
        )
    last = [result["loss"] for results in by_arm.values() for result in results]
    # The first points, near log 256 = 5.5 nats, would squeeze the differences into a line.
    axes.set_ylim(min(last) - 0.05, max(last) + 0.6)
    axes.set_xlabel("steps")
    axes.set_ylabel("held-out loss, nats a byte (bands: range of seeds)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


EXPERIMENT = Experiment(
    what="Transformer, GELU, squared ReLU, MDHA, Transformer++, Primer-EZ and Primer of equal "
    "parameters, from bytes (section 4)",
    points=_points,
    run=run_point,
    report=_report,
    hours={"smoke": 0.01, "small": 0.3, "full": 10_000.0},
    alone=lambda point: "clock" in point,
)
