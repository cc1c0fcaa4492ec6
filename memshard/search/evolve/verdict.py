"""What trainings again, from fresh initial values, say: noise of a loss, whether one program beats
another, and by what factor in cost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Curve = Sequence[tuple[float, float]]
"""(cost, loss) along one training, costs rising."""
SIGMAS = 2.0
DRAWS = 2000


class Noise(NamedTuple):
    """Mean and standard deviation of losses from several seeds; the band of no difference is the
    mean give or take SIGMAS deviations.
    """

    mean: float
    deviation: float
    runs: int


class Interval(NamedTuple):
    """An estimate with its 95 % interval; None where it was not reached, which is a value and not
    extrapolated.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """Loss of `before` less loss of `after`, and the deviation of a single training, pooled. beats:
    outside the noise band.
    """

    gain: float
    deviation: float

    @property
    def beats(self) -> bool:
        return self.gain > SIGMAS * self.deviation


def noise(losses: Sequence[float]) -> Noise:
    """Of at least one loss; the deviation of a single one is not known, nan."""
    return Noise(
        float(np.mean(losses)),
        float(np.std(losses, ddof=1)) if len(losses) > 1 else math.nan,
        len(losses),
    )


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Two programs by their losses from several seeds each, at least two."""
    a, b = noise(before), noise(after)
    pooled = ((a.runs - 1) * a.deviation**2 + (b.runs - 1) * b.deviation**2) / (a.runs + b.runs - 2)
    return Comparison(a.mean - b.mean, math.sqrt(pooled))


def speed_up(before: Sequence[Curve], after: Sequence[Curve], seed: int = 0) -> Interval:
    """Cost of `before` over the cost at which `after` reaches the final loss of `before`; at least
    one training each.

    Curves are averaged over trainings, never rise (running minimum) and are read between points in
    log-log. The interval is the bootstrap's over trainings; its ends are None where the draws there
    do not reach the loss.
    """
    draw = np.random.default_rng(seed)
    factors = []
    for _ in range(DRAWS):
        factors.append(_factor(resample(before, draw), resample(after, draw)))
    ordered = sorted(factors)  # not reached is 0, below all
    low, high = ordered[int(0.025 * DRAWS)], ordered[int(0.975 * DRAWS)]
    return Interval(*(value or None for value in (_factor(before, after), low, high)))


def resample(curves: Sequence[Curve], draw: np.random.Generator) -> list[Curve]:
    """As many trainings, drawn with replacement."""
    return [curves[i] for i in draw.integers(0, len(curves), len(curves))]


def mean_curve(curves: Sequence[Curve]) -> NDArray[np.float64]:
    """Geometric mean of costs and mean of losses, point by point: [points, 2]. The loss never
    rises.
    """
    stacked = np.asarray([list(curve) for curve in curves], dtype=np.float64)
    costs, losses = (
        np.exp(np.log(stacked[..., 0]).mean(0)),
        np.minimum.accumulate(stacked[..., 1].mean(0)),
    )
    return np.stack([costs, losses], axis=1)


def _factor(before: Sequence[Curve], after: Sequence[Curve]) -> float:
    """0 where the loss is not reached."""
    first, second = mean_curve(before), mean_curve(after)
    target = np.log(first[-1, 1])
    costs, losses = np.log(second[:, 0]), np.log(second[:, 1])
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return 0.0
    i = reached[0]
    cost = (
        costs[0]
        if i == 0
        else costs[i - 1]
        + (losses[i - 1] - target) / (losses[i - 1] - losses[i]) * (costs[i] - costs[i - 1])
    )
    return float(np.exp(np.log(first[-1, 0]) - cost))
