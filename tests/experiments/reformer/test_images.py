"""Images are trained on and completed."""

from pathlib import Path

import pytest

from memshard.experiments.common import catalogue
from memshard.launch.cli.main import main


def test_images_without_data_name_the_command() -> None:
    experiment = catalogue.find("reformer/images")
    with pytest.raises(FileNotFoundError, match="memshard data build IMAGES --images"):
        experiment.run(experiment.points("smoke")[0] | {"data": "nowhere"})


def test_images_are_trained_on_and_completed(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(8):
        Image.new("RGB", (4, 4), (30 * number, 100, 255 - 30 * number)).save(
            tmp_path / f"{number}.png"
        )
    data = str(tmp_path / "data")
    assert (
        main(
            [
                "data",
                "build",
                str(tmp_path),
                "--images",
                "--image-size",
                "4",
                "--held-out",
                "2",
                "--out",
                data,
            ]
        )
        == 0
    )
    experiment = catalogue.find("reformer/images")
    point = experiment.points("smoke")[0] | {"data": data, "run": str(tmp_path / "run"), "steps": 3}
    result = experiment.run(point)
    originals, completed = result["originals"], result["completed"]
    assert len(originals) == 2 and [row[:24] for row in originals] == [
        row[:24] for row in completed
    ]
    assert all(len(row) == 48 and max(row) < 256 for row in completed)
    assert (
        originals[0][1::3] == [100] * 16
        and 0 < result["baseline_bits"] < 8
        and 7 < result["bits"] < 12
    )
    assert (
        "bits a value" in experiment.report([(point, result)], tmp_path)
        and (tmp_path / "images.png").exists()
    )
