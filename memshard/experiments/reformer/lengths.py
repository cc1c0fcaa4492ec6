"""Time against length at equal tokens: full attention and LSH attention of 1, 2, 4, 8 rounds
(Kitaev et al. 2020, figure 5, right).
"""

import statistics
from pathlib import Path
from typing import Any

import torch

from memshard.experiments.common.catalogue import Experiment, Point, Scale
from memshard.experiments.common.clock import now
from memshard.experiments.common.curves import lines
from memshard.experiments.common.repeated import median_range
from memshard.models.context import Context
from memshard.models.initialize import initialize
from memshard.models.mixers.kinds import bucket_count
from memshard.models.mixers.lsh import LSHMixer
from memshard.models.mixers.softmax import SoftmaxMixer

_ROUNDS, _CHUNK = (1, 2, 4, 8), 64
_SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"tokens": 2048, "lengths": [512, 1024], "repeats": 1},
    "small": {"tokens": 16_384, "lengths": [1024, 2048, 4096, 8192, 16_384], "repeats": 7},
    "full": {"tokens": 131_072, "lengths": [1024, 4096, 16_384, 65_536, 131_072], "repeats": 5},
}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Time a layer's forward and backward: return kind ("full" or "LSH-r") -> length -> seconds of
    processor time (on a GPU, of the device), a number a round.

    Every kind at every length takes its turn in a round. One layer of two heads, width 128, chunks
    of 64.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers: dict[str, torch.nn.Module] = {"full": SoftmaxMixer(128, 2)}
    layers |= {f"LSH-{rounds}": LSHMixer(128, 2, 1, rounds, _CHUNK) for rounds in _ROUNDS}
    for layer in layers.values():
        initialize(layer.to(device), 0)
    seconds: dict[str, dict[str, list[float]]] = {
        kind: {str(length): [] for length in point["lengths"]} for kind in layers
    }
    # In turns, so that whatever slows the machine slows all kinds alike.
    for turn in range(point["repeats"] + 1):
        for length in point["lengths"]:
            x = (
                torch.randn(
                    point["tokens"] // length,
                    length,
                    128,
                    generator=torch.Generator().manual_seed(0),
                )
                .to(device)
                .requires_grad_()
            )
            ctx = Context.of(x[..., 0])
            for kind, layer in layers.items():
                if isinstance(layer, LSHMixer):
                    layer.buckets = bucket_count(length, _CHUNK)
                begun = now(device)
                layer(x, ctx)[0].sum().backward()
                if turn:  # the first one builds kernels and allocates
                    seconds[kind][str(length)].append(now(device) - begun)
    return seconds


def _points(scale: Scale) -> list[Point]:
    return [_SIZES[scale]]


def _report(rows: list[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    ((point, result),) = rows
    times = {
        kind: {int(length): seconds for length, seconds in of.items()}
        for kind, of in result.items()
    }
    lines(times, {}, folder / "lengths.png", "length", "seconds a layer, forward and backward")
    text = (
        f"Seconds of one layer, forward and backward, {point['tokens']:,} tokens at every "
        "length, one thread; "
    )
    text += f"medians of {point['repeats']} interleaved rounds (range).\n\n"
    text += f"| length | {' | '.join(times)} |\n|---|{'---|' * len(times)}\n"
    for length in point["lengths"]:
        cells = [median_range(of[length], ".2f") for of in times.values()]
        text += f"| {length:,} | {' | '.join(cells)} |\n"
    lsh, full = times["LSH-2"], times["full"]
    slower = [
        length
        for length in point["lengths"]
        if statistics.median(lsh[length]) >= statistics.median(full[length])
    ]
    # Beyond the last length at which it is not: a lucky time at a short one does not count.
    faster = [length for length in point["lengths"] if length > max(slower, default=0)]
    text += (
        f"\nTwo rounds are faster than full attention from length {min(faster):,} on.\n"
        if faster
        else ""
    )
    return text + "\n![seconds a layer against length](lengths.png)\n"


EXPERIMENT = Experiment(
    what="time against length at equal tokens: full attention, LSH of 1, 2, 4, 8 rounds (figure "
    "5, right)",
    points=_points,
    run=measure,
    report=_report,
    hours={"smoke": 0.01, "small": 0.05, "full": 4.0},
    alone=lambda point: True,
)
