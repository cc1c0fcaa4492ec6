"""The frontier of loss against cost over several sizes, l = a c^-k, and the savings it implies (So
et al. 2021).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memshard.search.evolve.verdict import DRAWS, Curve, Interval, mean_curve, resample

Sizes = Mapping[float, Sequence[Curve]]
"""Curves of trainings, by size."""
BEGINNING = 0.25
"""Share of a training that the frontier leaves out."""


class PowerLaw(NamedTuple):
    """The fit l = a c^-k of loss l to cost c."""

    a: float
    k: float


class Comparison(NamedTuple):
    """Power laws of two programs, with 95 % intervals by the bootstrap over trainings.

    difference: k of the second less k of the first; if 0 is inside, no difference is shown. factor:
    with one exponent for both, cost of the first over cost of the second at equal loss, b =
    (a1/a2)^(1/k); the second then saves 1 - 1/b of the cost.
    """

    first: PowerLaw
    second: PowerLaw
    k_first: Interval
    k_second: Interval
    difference: Interval
    factor: Interval


def hull(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the points (cost, loss) on the lower convex hull in log-log, as far as the loss falls:
    no size and no time to stop does better.
    """
    logs = np.log(points[np.lexsort((points[:, 1], points[:, 0]))])
    kept: list[NDArray[np.float64]] = []
    for point in logs:
        # Andrew's monotone chain: drop points that the line to the new one passes below.
        while len(kept) > 1 and _turn(kept[-2], kept[-1], point) <= 0:
            kept.pop()
        kept.append(point)
    falling = [
        point for number, point in enumerate(kept) if number == 0 or point[1] < kept[number - 1][1]
    ]
    return np.exp(np.asarray(falling))


def fit(points: NDArray[np.float64]) -> PowerLaw:
    """Fit log loss to log cost by least squares. points: [n, 2], n at least 2."""
    slope, offset = np.polyfit(np.log(points[:, 0]), np.log(points[:, 1]), 1)
    return PowerLaw(float(np.exp(offset)), float(-slope))


def frontier(sizes: Sizes) -> NDArray[np.float64]:
    """Return the hull of the mean curves of all sizes, without their beginnings, which follow no
    power law.
    """
    means = [mean_curve(curves) for curves in sizes.values()]
    return hull(np.concatenate([mean[mean[:, 0] >= BEGINNING * mean[-1, 0]] for mean in means]))


def compare(first: Sizes, second: Sizes, seed: int = 0) -> Comparison:
    """Compare the frontiers of two programs. ValueError if one of them is a single point."""
    best = _estimates(first, second)
    random = np.random.default_rng(seed)
    estimates = []
    # 500 draws: each fits two frontiers, and 2.5 % of 500 are still 12 draws at either end.
    for _ in range(DRAWS // 4):
        estimates.append(
            _estimates(
                *(
                    {size: resample(curves, random) for size, curves in sizes.items()}
                    for sizes in (first, second)
                )
            )
        )
    low, high = np.percentile(np.asarray(estimates), [2.5, 97.5], axis=0)
    intervals = [Interval(float(best[i]), float(low[i]), float(high[i])) for i in range(4)]
    return Comparison(fit(frontier(first)), fit(frontier(second)), *intervals)


def _estimates(first: Sizes, second: Sizes) -> tuple[float, float, float, float]:
    """Return k of both, their difference, and b from a fit with one exponent."""
    points = [frontier(first), frontier(second)]
    if min(map(len, points)) < 2:
        raise ValueError("a frontier is a single point; train at more sizes")
    laws = [fit(side) for side in points]
    # One slope, two offsets: least squares on [log c, is first, is second].
    logs, second_side = (
        np.log(np.concatenate(points)),
        np.repeat([0.0, 1.0], [len(side) for side in points]),
    )
    slope, one, two = np.linalg.lstsq(
        np.stack([logs[:, 0], 1 - second_side, second_side], 1), logs[:, 1], rcond=None
    )[0]
    return laws[0].k, laws[1].k, laws[1].k - laws[0].k, float(np.exp((one - two) / -slope))


def _turn(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> float:
    """Return a number that is positive where a, b, c turn left."""
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))
