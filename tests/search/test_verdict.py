"""Speed-ups and power laws are found again in curves that were made with them."""

import numpy as np
import pytest

from memshard.search.evolve import power_law
from memshard.search.evolve.verdict import Curve, compare, speed_up

COSTS = np.geomspace(50, 1000, 13)


def _curves(
    factor: float, seeds: int, noise: float = 0.002, a: float = 8.0, k: float = 0.2
) -> list[Curve]:
    """Return trainings whose loss is a (cost factor)^-k."""
    draw = np.random.default_rng(seeds)
    return [
        list(
            zip(
                COSTS,
                a * (COSTS * factor) ** -k * np.exp(noise * draw.standard_normal()),
                strict=True,
            )
        )
        for _ in range(seeds)
    ]


def test_a_known_speed_up_is_found_within_its_interval() -> None:
    interval = speed_up(_curves(1.0, 4), _curves(1.5, 5))
    assert interval.low is not None and interval.high is not None and interval.value is not None
    assert (
        interval.low < 1.5 < interval.high
        and interval.value == pytest.approx(1.5, rel=0.03)
        and interval.high - interval.low < 0.3
    )


def test_a_loss_that_is_not_reached_is_said_so_and_not_extrapolated() -> None:
    assert speed_up(_curves(1.0, 3), _curves(0.7, 3)) == (None, None, None)


def test_a_gain_inside_the_noise_of_seeds_is_no_win() -> None:
    assert not compare([2.00, 2.02, 2.04], [1.99, 2.01, 2.02]).beats
    assert compare([2.00, 2.02, 2.04], [1.90, 1.91, 1.93]).beats


def test_the_hull_is_what_no_other_point_undercuts() -> None:
    points = np.exp(
        np.array(
            [[0.0, 3.0], [1.0, 2.9], [1.0, 2.0], [2.0, 1.5], [3.0, 1.2], [4.0, 1.3], [2.5, 2.0]]
        )
    )
    assert np.log(power_law.hull(points)) == pytest.approx(
        np.array([[0.0, 3.0], [1.0, 2.0], [2.0, 1.5], [3.0, 1.2]])
    )


def test_a_known_power_law_and_its_saving_are_found() -> None:
    """Sizes trade places along the curve l = 8 c^-0.2: each is best at one cost. The second side
    needs 1/1.5 of the cost.
    """

    def sizes(factor: float) -> dict[float, list[Curve]]:
        trainings = {}
        for size in (0.25, 0.5, 1.0, 2.0, 4.0):
            away = np.log(COSTS / (250 * size)) ** 2 * 0.05
            draw = np.random.default_rng(int(size * 100))
            losses = [
                8 * (COSTS * factor) ** -0.2 * np.exp(away + 0.001 * draw.standard_normal())
                for _ in range(3)
            ]
            trainings[size] = [list(zip(COSTS, loss, strict=True)) for loss in losses]
        return trainings

    law = power_law.compare(sizes(1.0), sizes(1.5))
    assert law.first.k == pytest.approx(0.2, abs=0.02) and law.factor.value == pytest.approx(
        1.5, rel=0.05
    )
    assert (
        law.difference.low is not None
        and law.difference.high is not None
        and law.difference.low <= 0.0 <= law.difference.high + 1e-9
    )
