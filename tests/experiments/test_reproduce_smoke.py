"""Every experiment at its tiny scale, from data to picture; `make reproduce-smoke`."""

import email
import json
import re
from pathlib import Path

import matplotlib
import pytest

from memshard.experiments.common import catalogue
from memshard.launch.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data of what lies on every machine: text of the standard library,
    pictures of matplotlib.
    """
    folder = tmp_path_factory.mktemp("smoke")
    text, pictures = (
        str(Path(email.__file__).parent),
        str(Path(matplotlib.get_data_path(), "images")),
    )
    sizes = ["--vocab", "512", "--held-out", "2"]
    assert (
        main(
            ["data", "build", text, "--suffix", ".py", *sizes, "--out", str(folder / "data/smoke")]
        )
        == 0
    )
    assert (
        main(
            [
                "data",
                "build",
                pictures,
                "--images",
                "--image-size",
                "4",
                "--held-out",
                "2",
                "--out",
                str(folder / "data/smoke_images"),
            ]
        )
        == 0
    )
    lines = [line.strip() for line in Path(email.__file__).read_text().splitlines() if line.strip()]
    for side, texts in (("en", lines), ("de", [line[::-1] for line in lines])):
        (folder / f"data/smoke_pairs.{side}").write_text("\n".join(texts))
    build = [
        "data",
        "build",
        *(str(folder / f"data/smoke_pairs.{side}") for side in ("en", "de")),
        "--documents",
        "pairs",
    ]
    assert (
        main(
            [*build, "--vocab", "320", "--held-out", "2", "--out", str(folder / "data/smoke_pairs")]
        )
        == 0
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", catalogue.names())
def test_runs_from_data_to_picture(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(["reproduce", name, "--scale", "smoke", "--workers", "1"]) == 0
    out = folder / "runs/reproduce" / name
    report = (out / "report.md").read_text()
    pictures = re.findall(r"\]\((.*?\.png)\)", report)
    assert pictures and all((out / picture).exists() for picture in pictures)
    summary = json.loads((out / "result.json").read_text())
    assert (
        len(summary["points"]) == len(catalogue.find(name).points("smoke"))
        and summary["versions"]["torch"]
    )


@pytest.mark.slow
def test_time_is_measured_when_nothing_else_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert (
        main(["reproduce", "pkm/headline", "--scale", "smoke", "--workers", "2", "--out", "beside"])
        == 0
    )
    rows = [json.loads(line) for line in Path("beside/points.jsonl").read_text().splitlines()]
    assert ["clock" in row["point"] for row in rows] == [False] * (len(rows) - 1) + [True]


def test_missing_data_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--list"]) == 0
    assert "(needs data/pkm, at scale smoke data/smoke)" in capfd.readouterr().out
    assert main(["reproduce", "pkm/headline", "--scale", "smoke", "--workers", "1"]) == 2
    error = capfd.readouterr().err
    assert "there is no data folder data/smoke: memshard data build TEXT" in error
