"""Statistics of programs trained again from fresh initial values: the noise of a loss, whether one
program beats another, and by what factor in cost.
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
    """Mean and standard deviation of losses from several seeds.

    A difference within SIGMAS deviations of the mean counts as none.
    """

    mean: float
    deviation: float
    runs: int


class Interval(NamedTuple):
    """An estimate with its 95 % interval. None means "not reached": nothing is extrapolated."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """gain: loss of `before` less loss of `after`. deviation: that of a single training, pooled
    over both.
    """

    gain: float
    deviation: float

    @property
    def beats(self) -> bool:
        """True if the gain is outside the noise band."""
        return self.gain > SIGMAS * self.deviation


def noise(losses: Sequence[float]) -> Noise:
    """Return the noise of at least one loss; the deviation of a single one is nan, not known."""
    return Noise(
        float(np.mean(losses)),
        float(np.std(losses, ddof=1)) if len(losses) > 1 else math.nan,
        len(losses),
    )


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compare two programs by their losses, from at least two seeds each."""
    a, b = noise(before), noise(after)
    # The pooled estimate: with four seeds a side it has 6 degrees of freedom instead of 3.
    pooled = ((a.runs - 1) * a.deviation**2 + (b.runs - 1) * b.deviation**2) / (a.runs + b.runs - 2)
    return Comparison(a.mean - b.mean, math.sqrt(pooled))


def speed_up(before: Sequence[Curve], after: Sequence[Curve], seed: int = 0) -> Interval:
    """Return the cost of `before` over the cost at which `after` reaches the final loss of
    `before`, from at least one training of each.

    Curves are averaged over trainings, never rise (running minimum), and are interpolated in
    log-log. The interval is a bootstrap's over trainings; its ends are None where the resampled
    trainings there do not reach the loss.
    """
    random = np.random.default_rng(seed)
    factors = []
    for _ in range(DRAWS):
        # Whole trainings are drawn, not points: those of one training depend on each other.
        factors.append(_factor(resample(before, random), resample(after, random)))
    ordered = sorted(factors)  # not reached is 0, below all
    low, high = ordered[int(0.025 * DRAWS)], ordered[int(0.975 * DRAWS)]
    return Interval(*(value or None for value in (_factor(before, after), low, high)))


def resample(curves: Sequence[Curve], random: np.random.Generator) -> list[Curve]:
    """Sample the same number of trainings, with replacement."""
    return [curves[i] for i in random.integers(0, len(curves), len(curves))]


def mean_curve(curves: Sequence[Curve]) -> NDArray[np.float64]:
    """Return the geometric mean of costs and the mean of losses, point by point: [points, 2]. The
    loss never rises.
    """
    stacked = np.asarray([list(curve) for curve in curves], dtype=np.float64)
    costs, losses = (
        # Costs are factors, so they are averaged as logarithms.
        np.exp(np.log(stacked[..., 0]).mean(0)),
        np.minimum.accumulate(stacked[..., 1].mean(0)),
    )
    return np.stack([costs, losses], axis=1)


def _factor(before: Sequence[Curve], after: Sequence[Curve]) -> float:
    """Return the speed-up, 0 where the loss is not reached."""
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
