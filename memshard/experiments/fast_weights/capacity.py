"""Measure how many pairs fit into a memory: loss against the number of different keys (Schlag et
al. 2021, figure 2).
"""

from pathlib import Path
from typing import Any

from memshard.experiments.common.catalogue import Experiment, Point, Scale
from memshard.experiments.common.curves import lines
from memshard.experiments.common.repeated import low_high, ranges
from memshard.experiments.fast_weights.retrieval import SOLVED, train

# Best held-out loss, read from the authors' published logs.
# 0.5 is what an empty memory gives: half the squared distance from zeros to a one-hot value.
_PUBLISHED = {
    "softmax": {
        20: 6e-4,
        40: 3e-4,
        60: 7e-5,
        100: 2e-5,
        120: 1e-5,
        200: 9e-6,
        260: 4e-6,
        360: 4e-3,
        400: 3e-6,
        600: 0.030,
    },
    "elu": {
        20: 9e-4,
        40: 8e-4,
        60: 0.025,
        100: 0.164,
        120: 0.232,
        200: 0.342,
        260: 0.378,
        360: 0.417,
        400: 0.422,
        600: 0.451,
    },
    "dpfp-1": {
        20: 8e-4,
        40: 3e-4,
        60: 4e-4,
        100: 2e-4,
        120: 0.008,
        200: 0.173,
        260: 0.270,
        360: 0.336,
        400: 0.341,
        600: 0.411,
    },
    "dpfp-2": {
        20: 3e-4,
        40: 6e-4,
        60: 1e-3,
        100: 5e-4,
        120: 3e-4,
        200: 4e-4,
        260: 0.008,
        360: 0.159,
        400: 0.164,
        600: 0.323,
    },
    "dpfp-3": {
        20: 5e-4,
        40: 9e-4,
        60: 5e-4,
        100: 5e-4,
        120: 5e-4,
        200: 9e-4,
        260: 4e-4,
        360: 0.003,
        400: 0.036,
        600: 0.198,
    },
    "favor-64": {
        20: 0.117,
        40: 0.274,
        60: 0.483,
        100: 0.496,
        120: 0.5,
        200: 0.5,
        260: 0.5,
        360: 0.5,
        400: 0.5,
        600: 0.5,
    },
    "favor-128": {
        20: 0.074,
        40: 0.175,
        60: 0.484,
        100: 0.5,
        120: 0.5,
        200: 0.5,
        260: 0.5,
        360: 0.5,
        400: 0.5,
        600: 0.5,
    },
    "favor-512": {
        20: 0.024,
        40: 0.075,
        60: 0.406,
        100: 0.5,
        120: 0.5,
        200: 0.5,
        260: 0.5,
        360: 0.5,
        400: 0.5,
        600: 0.5,
    },
}
_SIZES: dict[Scale, list[int]] = {
    "smoke": [20],
    "small": [20, 40, 60, 80, 100, 120, 160, 200, 260, 360, 600],
    "full": list(range(20, 601, 20)),
}
_STEPS: dict[Scale, dict[int, int]] = {
    "smoke": {20: 200},
    "small": {120: 5000, 260: 2000, 600: 1000},
    "full": {600: 100_000},
}
"""Steps, by the largest number of pairs that gets them."""
_SEEDS: dict[Scale, int] = {"smoke": 1, "small": 2, "full": 1}
_LONG: dict[Scale, list[tuple[int, str, int]]] = {
    "smoke": [],
    "small": [(240, "dpfp-2", 10_000)],
    "full": [],
}
"""Pairs, features and steps of a task that is solved only after that many steps."""


def _points(scale: Scale) -> list[Point]:
    # FAVOR+ also without a guard against underflow, as the authors had it.
    kinds = ["softmax", "dpfp-1"] if scale == "smoke" else [*_PUBLISHED, "favor-64-published"]
    common = {"rule": "sum", "replace": False}
    sizes = [
        # The first bound that a size meets counts, so they are written in ascending order.
        (size, next(steps for most, steps in _STEPS[scale].items() if size <= most))
        for size in _SIZES[scale]
    ]
    cases = [(size, kind, steps) for size, steps in sizes for kind in kinds] + _LONG[scale]
    return [
        {"symbols": size, "features": kind, "steps": steps, **common, "seed": seed}
        for seed in range(1, _SEEDS[scale] + 1)
        for size, kind, steps in cases
    ]


def _report(rows: list[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    losses_by: dict[str, dict[int, list[float | None]]] = {}
    stopped = {
        (point["features"], point["symbols"])
        for point, result in rows
        if _unfinished(point, result)
    }
    for point, result in rows:
        losses_by.setdefault(point["features"], {}).setdefault(point["symbols"], []).append(
            result["loss"]
        )
    losses_by = {kind: dict(sorted(losses.items())) for kind, losses in losses_by.items()}
    # A loss of None diverged: it stands in the table and cannot be drawn.
    finite = {
        kind: {size: [loss for loss in of if loss is not None] for size, of in losses.items()}
        for kind, losses in losses_by.items()
    }
    drawn = {
        kind: {size: of for size, of in losses.items() if of} for kind, losses in finite.items()
    }
    # Published sizes that were not measured at this scale would be rings without a curve.
    compared = {
        kind: {size: loss for size, loss in of.items() if size in losses_by.get(kind, ())}
        for kind, of in _PUBLISHED.items()
    }
    lines(
        drawn,
        compared,
        folder / "capacity.png",
        "pairs",
        "held-out loss",
        unfinished=stopped,
        solved=SOLVED,
    )
    sizes = sorted({size for losses in losses_by.values() for size in losses})
    # Softmax has all common sizes, so a size that it lacks is one of _LONG.
    longer = (point for point, _ in rows if point["symbols"] not in losses_by["softmax"])
    long = dict.fromkeys(
        f"{point['steps']:,} with {point['features']} of {point['symbols']}" for point in longer
    )
    most = {
        point["steps"]: point["symbols"]
        for point, _ in rows
        if point["symbols"] in losses_by["softmax"]
    }  # the largest comes last
    text = (
        f"Best held-out loss, {ranges(rows)}, in brackets the published one. Attention over S "
        "pairs of different keys. At most "
        + ", ".join(
            [*(f"{steps:,} steps up to {size} pairs" for steps, size in most.items()), *long]
        )
        + f"; * a seed met that end. Runs end before where they are solved (below {SOLVED:g}) or "
        "have not improved for 1,000 steps. "
        "Published ones had up to 100,000.\n\n"
    )
    text += (
        f"| features | {' | '.join(str(size) for size in sizes)} |\n|---|{'---|' * len(sizes)}\n"
    )
    for kind, losses in losses_by.items():
        cells = []
        for size in sizes:
            published = _PUBLISHED.get(kind, {}).get(size)
            cell = (
                f"{low_high(losses[size], '.2g')}{'*' if (kind, size) in stopped else ''}"
                if size in losses
                else ""
            )
            cells.append(cell + (f" ({published:.2g})" if cell and published is not None else ""))
        text += f"| {kind} | {' | '.join(cells)} |\n"
    return text + "\n![loss against the number of pairs](capacity.png)\n"


def _unfinished(point: Point, result: dict[str, Any]) -> bool:
    """Return whether the run came to its last step before the task was solved."""
    step, loss = result["curve"][-1]
    return step == point["steps"] and (loss is None or loss >= SOLVED)


EXPERIMENT = Experiment(
    what="retrieval of S different keys: how much softmax, ELU+1, DPFP and FAVOR+ attention hold "
    "(figure 2)",
    points=_points,
    run=train,
    report=_report,
    hours={"smoke": 0.01, "small": 2.6, "full": 20.0},
)
