"""Time against length at equal tokens: full attention and LSH attention of 1, 2, 4, 8 rounds (Kitaev et al. 2020, figure 5, right)."""

import statistics
from pathlib import Path
from typing import Any

import torch

from memshard.models.context import Context
from memshard.models.initialize import initialize
from memshard.models.mixers.lsh import LSHMixer
from memshard.models.mixers.softmax import SoftmaxMixer
from memshard.search.reproduce.catalogue import Experiment, Point, Scale
from memshard.search.reproduce.clock import now
from memshard.search.reproduce.curves import lines

_ROUNDS = (1, 2, 4, 8)
_SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"tokens": 2048, "lengths": [512, 1024], "repeats": 1},
    "small": {"tokens": 16_384, "lengths": [1024, 2048, 4096, 8192, 16_384], "repeats": 3},
    "full": {"tokens": 131_072, "lengths": [1024, 4096, 16_384, 65_536, 131_072], "repeats": 5},
}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Seconds of processor time of a layer's forward and backward, median of interleaved passes, by kind: "full" or "LSH-r".

    One layer of two heads, width 128, chunks of 64. On a GPU, where there is one, seconds of the device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers: dict[str, torch.nn.Module] = {"full": SoftmaxMixer(128, 2)}
    layers |= {f"LSH-{rounds}": LSHMixer(128, 2, rounds, 64) for rounds in _ROUNDS}
    batch = point["tokens"] // point["length"]
    x = torch.randn(batch, point["length"], 128, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    ctx = Context.of(x[..., 0])
    seconds: dict[str, list[float]] = {kind: [] for kind in layers}
    for layer in layers.values():
        initialize(layer.to(device), 0)
    for turn in range(point["repeats"] + 1):
        for kind, layer in layers.items():
            begun = now(device)
            layer(x, ctx)[0].sum().backward()
            if turn:
                seconds[kind].append(now(device) - begun)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def _points(scale: Scale) -> list[Point]:
    size = _SIZES[scale]
    return [{"length": length, "tokens": size["tokens"], "repeats": size["repeats"]} for length in size["lengths"]]


def _report(rows: list[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    kinds = list(rows[0][1])
    found = {kind: {point["length"]: result[kind] for point, result in rows} for kind in kinds}
    lines(found, {}, folder / "lengths.png", "length", "seconds a layer, forward and backward")
    text = f"Seconds of one layer, forward and backward, {rows[0][0]['tokens']:,} tokens at every length, one thread.\n\n"
    text += f"| length | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}\n"
    for point, result in rows:
        text += f"| {point['length']:,} | {' | '.join(f'{result[kind]:.2f}' for kind in kinds)} |\n"
    crossed = [point["length"] for point, result in rows if result["LSH-2"] < result["full"]]
    text += f"\nTwo rounds are faster than full attention from length {min(crossed):,} on.\n" if crossed else ""
    return text + "\n![seconds a layer against length](lengths.png)\n"


EXPERIMENT = Experiment(
    what="time against length at equal tokens: full attention, LSH of 1, 2, 4, 8 rounds (figure 5, right)",
    points=_points,
    run=measure,
    report=_report,
    hours={"smoke": 0.01, "small": 0.05, "full": 4.0},
)
