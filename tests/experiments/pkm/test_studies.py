"""The studies of memories: what they share is trained once, and tables say what was found."""

from pathlib import Path
from typing import Any

import pytest

from memshard.experiments.common import catalogue
from memshard.experiments.pkm import runs
from memshard.experiments.pkm.picture import _family
from memshard.experiments.pkm.report import report
from tests.trainer.conftest import data  # noqa: F401

STUDIES = [name for name in catalogue.names() if name.startswith(("pkm/", "lookup/"))]


def _points(name: str, data: Path) -> list[dict[str, Any]]:  # noqa: F811
    return [
        {**point, "overrides": [*point["overrides"], f"data.path={data}"]}
        for point in catalogue.find(name).points("smoke")
        if "clock" not in point
    ]


def test_equal_models_are_trained_once(
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, memory, *_ = _points("pkm/headline", data)
    first = runs.learn(memory)
    (folder,) = runs.RUNS.iterdir()
    assert (
        not (folder / "checkpoints").exists()
        and first["table"] == 32 * 32 * 32
        and 0 < first["usage"] <= 1
    )
    monkeypatch.setattr(runs, "train_to_end", pytest.fail)
    assert runs.learn({**memory, "label": "another study's name"}) == first


@pytest.mark.parametrize("name", [*STUDIES, "fast_weights/language", "fast_weights/translation"])
def test_every_scale_is_made_of_recipes(name: str) -> None:
    """Every model has keys that exist and sizes that fit, and none is listed twice
    under two names.
    """
    from memshard.trainer.config.load import load_recipe

    for scale in catalogue.SCALES:
        points = catalogue.find(name).points(scale)
        models = [model for point in points for model in point.get("models", {0: point}).values()]
        assert all(load_recipe(model["recipe"], model["overrides"]) for model in models)
        runs = [
            (str(load_recipe(p["recipe"], p["overrides"])), p.get("builder"))
            for p in points
            if "clock" not in p
        ]
        assert len(set(runs)) == len(runs)


def test_without_data_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    point, *_ = catalogue.find("pkm/keys").points("small")
    with pytest.raises(FileNotFoundError, match=r"memshard data build TEXT .* --out data/pkm"):
        runs.learn(point)


def test_the_report_pairs_seeds_and_rounds(tmp_path: Path) -> None:
    def learned(label: str, loss: float, **use: float) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"label": label, "published": {"memory": "15.6"}.get(label, "")}, {
            "loss": loss,
            "perplexity": 100 * loss,
            "dense": 2e6,
            "table": 1e6 if use else 0,
            "tokens": 1000,
            "trained_tokens": 2_000_000,
            "lr": 1e-3,
            "table_lr": 4e-3,
            **use,
        }

    use = {"usage": 0.5, "kl_weighted": 1.5, "kl_count": 1.0}
    rows = [
        learned("none", 5.0),
        learned("memory", 4.9, **use),
        learned("none", 5.2),
        learned("memory", 5.0, **use),
    ]
    times = {
        "training": {"none": [10.0, 20.0, 30.0]},
        "inference": {"none": [1.0, 2.0, 4.0], "memory": [2.0, 3.0, 4.0]},
    }
    clock = {
        "clock": 3,
        "title": "Speed",
        "models": {"none": {}, "memory": {}},
        "trained": ["none"],
    }
    text = report([*rows, (clock, times)], tmp_path, name="study")
    assert (
        "| memory | 495.00 +- 7.07 | +0.1500 +- 0.0707 | 3 | 2.00 M | 1.00 M | 50.0 +- 0.0 % | "
        "1.50 +- 0.00 | 15.6 |" in text
    )
    assert (
        "| none | 20 | 1.00 (1.00 to 1.00) | 2 |" in text
        and "| memory |  |  | 3 | 1.50 (1.00 to 2.00) |" in text
    )
    assert (tmp_path / "study.png").stat().st_size > 10_000


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
