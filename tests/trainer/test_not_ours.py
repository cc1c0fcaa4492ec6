"""Nothing that memshard did not write is removed or written over, whatever its name."""

import json
from pathlib import Path

import pytest

from memshard.launch.cli.main import main
from memshard.trainer.checkpoint.folders import COMMIT, committed, prune
from memshard.trainer.export.export import export
from tests.data_pipeline.conftest import largest_file
from tests.trainer.tiny_run import train_run


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_saves_leave_everything_else_in_checkpoints_alone(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A user's notes, archives and links, a copy under way, a checkpoint that was moved away."""
    folder = tmp_path / "run"
    root = folder / "checkpoints"
    train_run(recipe, folder, stop_at=2)
    moved = (root / "step-00000002").rename(tmp_path / "far")
    (root / "step-00000002").symlink_to(moved)
    for name in ("step-notes", "step-best", "step-00000001", "step-00000006", "step-0000007.tmp"):
        (root / name).mkdir()
        (root / name / "kept.txt").write_text(name)
    for name in ("step-00000003.tar.gz", "step-00000003-is-best.txt", "step-00000008"):
        (root / name).write_text(name)
    (root / "step-latest").symlink_to("step-00000004")
    killed = [root / f"step-00000002.0123abcd.{ending}" for ending in ("partial", "tmp")]
    for folder_of_kill in killed:
        folder_of_kill.mkdir()
    before = _files(root) | _files(moved)

    train_run(recipe, folder, "train.save_every=2", "train.keep=2")
    assert not any(path.exists() for path in killed)
    assert [path.name for path in committed(root)] == [
        "step-00000002",
        "step-00000008",
        "step-00000010",
    ]
    assert (root / "step-00000002").is_symlink() and (root / "step-latest").is_symlink()
    after = _files(root) | _files(moved)
    # What stood where a checkpoint had to go has another name now.
    before["unfinished-step-00000006/kept.txt"] = before.pop("step-00000006/kept.txt")
    before["unfinished-step-00000008"] = before.pop("step-00000008")
    assert {name: after[name] for name in before} == before
    assert "was in the way: it is" in caplog.text


def test_a_damaged_checkpoint_that_was_set_aside_before_stays(recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "run/checkpoints"
    train_run(recipe, tmp_path / "run", stop_at=2)
    for number in range(3):
        train_run(recipe, tmp_path / "run", stop_at=4)
        (root / "step-00000004/state.json").write_text(f"{number}")
    damaged = {path.name: (path / "state.json").read_text() for path in root.glob("damaged-*")}
    assert damaged == {"damaged-step-00000004": "0", "damaged-step-00000004.2": "1"}


def test_an_export_leaves_a_folder_of_its_temporary_name_alone(
    recipe: Path, tmp_path: Path
) -> None:
    train_run(recipe, tmp_path / "run", stop_at=1)
    for name in ("m.tmp", "m.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.py").write_text("years of work")
    export(tmp_path / "run", tmp_path / "m")
    assert (tmp_path / "m.tmp/thesis.py").exists() and (tmp_path / "m.partial/thesis.py").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.partial", "m.tmp", "run"]


def test_an_import_leaves_a_folder_of_its_temporary_name_alone(
    recipe: Path, tmp_path: Path
) -> None:
    train_run(recipe, tmp_path / "run", stop_at=1)
    export(tmp_path / "run", tmp_path / "export")
    for name in ("m.tmp", "m.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.py").write_text("years of work")
    with largest_file(1000):
        assert main(["import", str(tmp_path / "export"), str(tmp_path / "m")]) == 2
    names = ["export", "m.partial", "m.tmp", "run"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names, "nothing of it stays"
    assert main(["import", str(tmp_path / "export"), str(tmp_path / "m")]) == 0
    assert (tmp_path / "m.tmp/thesis.py").exists() and (tmp_path / "m.partial/thesis.py").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "m"])


def test_an_export_that_fails_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", stop_at=1)
    with largest_file(1000), pytest.raises(OSError, match="File too large.*model.safetensors"):
        export(tmp_path / "run", tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "deepspeed.json"])
def test_training_into_a_folder_of_other_files_is_refused(
    name: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with `--run .`, beside a recipe that is called config.yaml."""
    (tmp_path / name).write_text("# mine\n" + recipe.read_text())
    (tmp_path / "notes.md").write_text("notes")
    before = _files(tmp_path)
    assert main(["train", str(recipe), "--run", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert f"{tmp_path / name} is there already and was not written by memshard" in error
    assert _files(tmp_path) == before
    (tmp_path / name).unlink()
    assert main(["train", str(recipe), "--run", str(tmp_path), "train.steps=1"]) == 0
    assert main(["train", str(recipe), "--run", str(tmp_path), "train.steps=2"]) == 0
    assert (tmp_path / "notes.md").read_text() == "notes"


@pytest.mark.parametrize("name", ["code/thesis.py", "recipe.yaml", "submit.sh", "hostfile"])
def test_launching_into_a_folder_of_other_files_is_refused(
    name: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "here" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("# mine")
    assert main(["launch", "slurm", str(recipe), "--run", str(tmp_path / "here")]) == 2
    assert "was not written by memshard: choose another folder with --run" in capfd.readouterr().err
    assert _files(tmp_path / "here") == {name: b"# mine"}


def test_a_search_and_an_experiment_write_over_no_report_of_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.md").write_text("mine")
    (tmp_path / "text").write_text("a" * 100)
    search = ["search", "run", str(tmp_path), f"text={tmp_path / 'text'}"]
    experiment = ["reproduce", "fast_weights/update", "--scale", "smoke", "--out", str(tmp_path)]
    for command in (search, experiment):
        assert main(command) == 2
        assert "report.md is there already" in capfd.readouterr().err
    assert (tmp_path / "report.md").read_text() == "mine"


def test_a_search_removes_states_of_programs_alone(tmp_path: Path) -> None:
    from tests.search import landscape

    states = tmp_path / "state"
    states.mkdir()
    for name in ("notes.txt", "best.safetensors", "7.safetensors"):
        (states / name).write_text(name)
    landscape.run_here(tmp_path, children=4, finalists=0, sizes=())
    assert sorted(path.name for path in states.iterdir()) == ["best.safetensors", "notes.txt"]
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])["event"] == "search"


def test_a_copy_with_a_shorter_number_is_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    """Nor is it the newest because of its name; nine digits come after eight."""
    for name in (
        "step-00000040",
        "step-100000000",
        "step-99999999",
        "step-20",
        "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0669\u0669",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / COMMIT).touch()
    names = ["step-00000040", "step-99999999", "step-100000000"]
    assert [path.name for path in committed(tmp_path)] == names
    prune(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        *names[1:],
        "step-20",
        "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0669\u0669",
    }
