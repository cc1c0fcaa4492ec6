"""Several measurements as text and as lines."""

from memshard.experiments.common.repeated import low_high, mean_deviation, median_range, ranges
from memshard.experiments.fast_weights.capacity import _unfinished
from memshard.experiments.fast_weights.update import _together
from memshard.experiments.pkm.picture import _family


def test_means_and_ranges() -> None:
    assert (
        mean_deviation([1.0, 2.0, 3.0], "+.1f") == "+2.0 +- 1.0"
        and mean_deviation([1.0], ".2f") == "1.00"
    )
    assert median_range([3.0, 1.0, 2.0], ".1f") == "2.0 (1.0 to 3.0)"
    assert (
        low_high([0.4, 1e-5], ".2g") == "1e-05 to 0.4" and low_high([0.501, 0.502], ".2g") == "0.5"
    )
    assert (
        low_high([None, None], ".2g") == "diverged"
        and low_high([0.5, None], ".2g") == "0.5, 1 diverged"
    )
    assert (
        ranges([({"seed": 1}, {}), ({"seed": 1}, {})]) == "one seed"
        and ranges([({"seed": s}, {}) for s in (1, 7)]) == "range of 2 seeds"
    )


def test_a_seed_that_has_ended_keeps_its_last_loss() -> None:
    assert _together([{100: 0.5, 200: 0.1}, {100: 0.4, 200: 0.3, 300: 0.2}]) == {
        100: [0.5, 0.4],
        200: [0.1, 0.3],
        300: [0.1, 0.2],
    }
    assert _together([{}, {100: 0.4}]) == {100: [0.4]} and _together([{}, {}]) == {}


def test_a_run_is_cut_short_by_its_last_step_unless_that_solves_it() -> None:
    ends = {(200, 0.5): True, (200, 0.0005): False, (100, 0.5): False, (200, None): True}
    for end, cut in ends.items():
        assert _unfinished({"steps": 200}, {"curve": [(100, 0.6), end]}) is cut


def test_what_shares_the_last_part_of_its_name_is_one_line() -> None:
    labels = [
        "none",
        "6 layers + 1",
        "8 layers + 1",
        "8 slots, no norm",
        "16 slots, no norm",
        "Memory+",
        "3 layers, one table, Memory+",
    ]
    families = [_family(label, labels) for label in labels]
    assert families == [
        "none",
        "1",
        "1",
        "no norm",
        "no norm",
        "Memory+",
        "3 layers, one table, Memory+",
    ]
