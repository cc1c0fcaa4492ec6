import json
from pathlib import Path

import pytest

from memshard.launch.cli.main import main


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    text = (
        "data: {path: nowhere}\nmodel: {layers: 3, dim: 64, memory: {layers: [1], keys: "
        "64}}\ntrain: {batch: 64}\n"
    )
    (tmp_path / "small.yaml").write_text(text)
    return str(tmp_path / "small.yaml")


def test_plan_prints_a_table_and_says_what_to_change(
    recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe_file, "--world", "8", "--device", "v100-16g"]) == 0
    out = capsys.readouterr().out
    assert "fits" in out and "32,768" in out and "vocabulary" in out
    assert (
        main(
            ["plan", recipe_file, "model.memory.keys=8192", "--world", "1", "--device", "v100-16g"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "does not fit" in out and "ranks" in out and "model.memory.keys=" in out


def test_each_kind_of_table_is_planned_by_what_a_run_has_measured_of_it(
    recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(Path(recipe_file).read_text("utf-8"), "utf-8")
    measured = {"blocks.1.memory.values": 3.0, "blocks.0.ngram.values": 7.5}
    line = {"step": 1} | {f"{table}/micro_batch_duplicates": x for table, x in measured.items()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
    ngram = ("model.ngram.layers=[0,2]", "model.ngram.rows=1000", "model.ngram.rule=longcat")
    command = ["plan", str(tmp_path), *ngram, "--world", "4", "--device", "a100"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "1 x 4,096 slots and 2 x 8,064 rows)" in out
    tables = [line for line in out.splitlines() if line.startswith("tables ")]
    for reads, line in zip(("3.0", "7.5"), tables, strict=True):
        assert f"at {reads} reads of a row" in line
    assert [line.split()[1] for line in tables] == ["memory:", "ngram:"]
    assert main([*command, "--duplicates", "2"]) == 0
    assert capsys.readouterr().out.count("at 2.0 reads of a row") == 2


def test_plan_as_json(recipe_file: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "plan",
                recipe_file,
                "--world",
                "2",
                "--device",
                "a100-80g",
                "--vocab",
                "1000",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capfd.readouterr().out)
    assert result["fits"] is True and result["vocab_size"] == 1000
    assert (
        result["parameters"]["table"] == 64 * 64 * 64
        and result["bytes"]["table_rows"] == 64 * 64 * 64 * 4 / 2
    )
    assert result["bytes"]["total"] == pytest.approx(
        sum(value for name, value in result["bytes"].items() if name != "total")
    )


def test_plan_refuses_no_ranks(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe_file, "--world", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_plan_of_many_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = "{layers: 3, dim: 64, memory: {layers: [1], keys: 64}}"
    (tmp_path / "a.yaml").write_text(
        f"data: {{path: nowhere}}\nmodel: {model}\ntrain: {{batch: 64}}\n"
    )
    recipe = str(tmp_path / "a.yaml")
    assert main(["plan", recipe, "--world", "1024", "--device", "h100-80g", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [part["rank"] for part in result["dry_run"]] == [0, 1023] and result["seconds"][
        "total"
    ] > 0
    assert [variant["name"] for variant in result["variants"]][-1] == "reversible" and len(
        result["variants"]
    ) == 4
    assert main(["plan", recipe, "--world", "1024", "--device", "h100-80g"]) == 0
    out = capfd.readouterr().out
    assert (
        "some of the 1024 ranks have nothing to train on" in out
        and "dry run as rank 0 and rank 1023 of 1024" in out
    )
    assert main(["plan", recipe, "parallel.tensor=3", "--world", "8"]) == 2
    assert "parallel.tensor is 3" in capfd.readouterr().err
