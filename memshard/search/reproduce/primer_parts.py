"""Primer's parts one by one (So et al. 2021, section 4): which of them lower the loss of a small model of bytes, at equal parameters.

The text is the source of Python's standard library, which lies on every machine; every tenth file is held out.
"""

import math
import statistics
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memshard.models.initialize import initialize
from memshard.models.linear import INIT_STD
from memshard.models.transformer import Transformer
from memshard.search.reproduce.catalogue import Experiment, Point, Scale
from memshard.search.reproduce.clock import now
from memshard.trainer.config.load import load_recipe
from memshard.trainer.evaluation.canvas import COLORS, canvas, clean
from memshard.trainer.optim.dense import build_adamw, learning_rate

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
"""A recipe and what is changed in it."""
_CLAIMS = [
    ("vanilla", "GELU"), ("GELU", "squared ReLU"), ("vanilla", "MDHA"), ("vanilla", "Transformer++"), ("squared ReLU", "Primer-EZ"),
    ("MDHA", "Primer-EZ"), ("Transformer++", "Primer-EZ"),
]  # fmt: skip
"""Worse, better."""
_SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"layers": 1, "dim": 32, "heads": 2, "length": 32, "batch": 4, "steps": 20, "lr": 1e-3, "every": 10, "windows": 8},
    "small": {"layers": 2, "dim": 128, "heads": 4, "length": 128, "batch": 8, "steps": 600, "lr": 1e-3, "every": 50, "windows": 128},
    "full": {"layers": 6, "dim": 512, "heads": 8, "length": 64, "batch": 64, "steps": 100_000, "lr": 1e-3, "every": 2000, "windows": 1024},
}
_SEEDS: dict[Scale, int] = {"smoke": 1, "small": 5, "full": 3}


def train(point: dict[str, Any]) -> dict[str, Any]:
    """Train point["arm"]; returns the held-out loss in nats a byte, the number of parameters, seconds, and the curve of (step, seconds of
    training, loss).
    """
    dim = point["dim"]
    sizes = [f"model.layers={point['layers']}", f"model.dim={dim}", f"model.mixer.heads={point['heads']}"]
    sizes += [f"model.vocab_size={_BYTES}", f"model.feedforward.hidden={dim * 8 // 3 if point['arm'] == 'Transformer++' else dim * 4}"]
    schedule = [f"optimizer.lr={point['lr']}", f"optimizer.warmup={point['steps'] // 12}", "optimizer.schedule=constant"]
    name, *changes = ARMS[point["arm"]]
    recipe = load_recipe(name, [*changes, *sizes, *schedule])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Transformer(recipe.model).to(device)
    initialize(model, point["seed"])
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.ndim > 1):
            # N(0, 1 / inputs) as in the paper: at this width 0.02 leaves hidden layers so small that GELU is nearly linear.
            matrix.mul_(matrix.shape[1] ** -0.5 / INIT_STD)
    optimizer = build_adamw(list(model.parameters()), recipe.optimizer)
    text, held_out = source_bytes()
    draw = torch.Generator().manual_seed(point["seed"])
    inside = torch.arange(point["length"] + 1)
    windows = held_out[torch.linspace(0, len(held_out) - len(inside), point["windows"]).long()[:, None] + inside].to(device)
    curve, seconds = [], 0.0
    for step in range(point["steps"]):
        begun = now(device)
        tokens = text[torch.randint(len(text) - len(inside), (point["batch"], 1), generator=draw) + inside].to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.optimizer, step, point["steps"])
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += now(device) - begun
        if (step + 1) % point["every"] == 0:
            curve.append((step + 1, seconds, _loss(model, windows)))
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"loss": curve[-1][2], "parameters": count, "seconds": seconds, "curve": curve}


@cache
def source_bytes() -> tuple[Tensor, Tensor]:
    """The bytes of the standard library's modules, packages left out, int64: to train on, and held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = files[::_HELD_OUT]
    parts = [file for file in files if file not in held_out], held_out
    first, second = (b"".join(file.read_bytes() for file in part) for part in parts)
    return torch.frombuffer(bytearray(first), dtype=torch.uint8).long(), torch.frombuffer(bytearray(second), dtype=torch.uint8).long()


@torch.no_grad()
def _loss(model: Transformer, windows: Tensor) -> float:
    return float(torch.cat([model(part[:, :-1], targets=part[:, 1:])[0] for part in windows.split(32)]).mean())


def reached(curve: list[Any], target: float, axis: int) -> float | None:
    """Where a curve of (step, seconds, loss), taken as its lowest loss so far, meets a loss; None where it does not. axis: 0 for steps, 1
    for seconds.
    """
    place, lowest = 0.0, math.inf
    for row in curve:
        if row[2] <= target:
            share = 1.0 if lowest == math.inf else (lowest - target) / (lowest - row[2])
            return float(place + share * (row[axis] - place))
        place, lowest = row[axis], min(lowest, row[2])
    return None


def _points(scale: Scale) -> list[Point]:
    return [{"arm": arm, "seed": seed, **_SIZES[scale]} for seed in range(_SEEDS[scale]) for arm in ARMS]


def _report(rows: list[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    found: dict[str, list[dict[str, Any]]] = {}
    for point, result in rows:
        found.setdefault(point["arm"], []).append(result)
    point, seeds = rows[0][0], len(found["vanilla"])
    text = (
        f"Bytes of Python's standard library, {point['layers']} layers of width {point['dim']}, {point['steps']:,} steps of "
        f"{point['batch']} x {point['length']}, {seeds} seeds. Loss: nats a held-out byte, mean and standard deviation. Gain: over "
        "vanilla, seed by seed. Faster: what vanilla takes in all over what it takes to vanilla's last loss, in steps and in processor "
        "time, median of seeds.\n\n"
        "| model | parameters | loss | gain | faster, steps | faster, time | us a byte |\n|---|---|---|---|---|---|---|\n"
    )
    for arm, results in found.items():
        losses = [result["loss"] for result in results]
        gains = [base["loss"] - loss for base, loss in zip(found["vanilla"], losses, strict=True)]
        cells = [arm, f"{results[0]['parameters']:,}", _spread(losses, ".4f"), _spread(gains, "+.4f") if arm != "vanilla" else ""]
        cells += [_factor(found["vanilla"], results, axis) for axis in (0, 1)]
        cells.append(f"{1e6 * statistics.median(r['seconds'] for r in results) / (point['steps'] * point['batch'] * point['length']):.1f}")
        text += f"| {' | '.join(cells)} |\n"
    text += "\n| worse | better | seeds in which it is | mean difference |\n|---|---|---|---|\n"
    for worse, better in _CLAIMS:
        differences = [a["loss"] - b["loss"] for a, b in zip(found[worse], found[better], strict=True)]
        wins = sum(difference > 0 for difference in differences)
        text += f"| {worse} | {better} | {wins} of {seeds} | {_spread(differences, '+.4f')} |\n"
    _draw(found, folder / "parts.png")
    return text + "\n![held-out loss by step](parts.png)\n"


def _spread(values: list[float], digits: str) -> str:
    deviation = f" +- {statistics.stdev(values):{digits.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{deviation}"


def _factor(vanilla: list[dict[str, Any]], results: list[dict[str, Any]], axis: int) -> str:
    """How many times faster the vanilla model's last loss is reached, median of seeds; a seed that does not reach it counts as 0."""
    pairs = zip(vanilla, results, strict=True)
    needed = [(base["curve"][-1][axis], reached(result["curve"], base["loss"], axis)) for base, result in pairs]
    factor = statistics.median(total / taken if taken else 0.0 for total, taken in needed)
    return f"{factor:.2f}" if factor else "not reached"


def _draw(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    figure = canvas(8, 4.5)
    axes = figure.subplots()
    clean(axes)
    for color, (arm, results) in zip(COLORS, found.items(), strict=False):
        steps = [row[0] for row in results[0]["curve"]]
        losses = [statistics.mean(result["curve"][place][2] for result in results) for place in range(len(steps))]
        axes.plot(steps, losses, color=color, linewidth=1.8, label=arm)
    last = [result["loss"] for results in found.values() for result in results]
    axes.set_ylim(min(last) - 0.05, max(last) + 0.6)
    axes.set_xlabel("steps")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


EXPERIMENT = Experiment(
    what="Transformer, GELU, squared ReLU, MDHA, Transformer++, Primer-EZ and Primer of equal parameters, from bytes (section 4)",
    points=_points,
    run=train,
    report=_report,
    hours={"smoke": 0.01, "small": 0.35, "full": 10_000.0},
)
