"""Primer's parts are compared at equal parameters."""

from pathlib import Path

import pytest

from memshard.experiments.common import catalogue


def test_parts_of_primer_are_compared_at_equal_parameters(tmp_path: Path) -> None:
    from memshard.experiments.primer.parts import ARMS, reached, source_bytes

    experiment = catalogue.find("primer/parts")
    points = experiment.points("smoke")
    rows = [
        (p, experiment.run(p | {"dim": 96, "steps": 10}))
        for p in points
        if p.get("arm") in ("vanilla", "Transformer++", "Primer")
    ]
    counts = [result["parameters"] for _, result in rows]
    assert counts == pytest.approx([counts[0]] * 3, rel=0.01)
    everything = [
        (points[0] | {"arm": arm}, {"loss": 2.0, "parameters": 5, "curve": [[10, 3.0], [20, 2.0]]})
        for arm in ARMS
    ]
    times = {arm: [3.0, 4.0] if arm == "Primer" else [2.0, 2.0] for arm in ARMS}
    text = experiment.report([*everything, (points[-1], times)], tmp_path)
    assert "| vanilla | GELU | 0 of 1 | +0.0000 |" in text and (tmp_path / "parts.png").exists()
    assert "| Primer | 5 | 2.0000 | +0.0000 | 1.75 (1.50 to 2.00) | 1.00 | 0.57 |" in text
    assert {len(seconds) for seconds in experiment.run(points[-1]).values()} == {
        points[-1]["clock"]
    }
    curve = [[10, 4.0], [20, 3.0], [30, 3.5], [40, 2.0]]
    assert (
        reached(curve, 3.0) == 20
        and reached(curve, 2.5) == 35
        and reached(curve, 5.0) == 10
        and reached(curve, 1.9) is None
    )
    train, held_out = source_bytes()
    assert len(train) > 5 * len(held_out) > 500_000 and int(train.max()) < 256
