"""Stopping and going on is the same as never stopping, to the last bit."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from memshard.launch.cli.main import main
from memshard.trainer.checkpoint.folders import COMMIT, find_checkpoints
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.run_folder import CONFIG_FILE
from memshard.trainer.watch.metrics import METRICS_FILE, read_metrics
from tests.distributed import run_distributed
from tests.launch.test_doctor import examine
from tests.trainer.tiny_run import TABLE, assert_same, checkpoint_state, prepare, train_run

REPRODUCIBLE = (
    "step",
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "eval/loss",
    f"{TABLE}/touched",
)


def _train_with_and_without_stops(rank: int, world: int, recipe: Path, folder: Path) -> list[bool]:
    """Train ten steps at once, stopped at the fifth, and at first meant to be five; return which of
    the parts say they are finished.
    """
    micro = "train.micro_batch=3"
    assert 5 * 8 < prepare(recipe, folder / "unused").stream.samples_per_epoch < 10 * 8
    results = [
        train_run(recipe, folder / "whole", micro),
        train_run(recipe, folder / "stopped", micro, stop_at=5),
        train_run(recipe, folder / "stopped", micro),
        train_run(recipe, folder / "longer", micro, "train.steps=5"),
        train_run(recipe, folder / "longer", micro),
    ]
    return [result["finished"] for result in results]


@pytest.mark.parametrize("world", [1, 2])
def test_five_and_five_steps_are_ten(world: int, recipe: Path, tmp_path: Path) -> None:
    if world == 1:
        finished = [_train_with_and_without_stops(0, 1, recipe, tmp_path)]
    else:
        finished = run_distributed(_train_with_and_without_stops, world, recipe, tmp_path)
    assert finished == [[True, False, True, True, True]] * world
    whole = checkpoint_state(tmp_path / "whole")
    for other in ("stopped", "longer"):
        assert_same(checkpoint_state(tmp_path / other), whole)
        assert _reproducible(tmp_path / other, evaluated_at=10) == _reproducible(
            tmp_path / "whole", evaluated_at=10
        )


def _reproducible(folder: Path, evaluated_at: int) -> list[dict[str, Any]]:
    """Return lines of metrics without times. A shorter run evaluates at its end, too."""
    lines = [
        {key: line[key] for key in REPRODUCIBLE if key in line}
        for line in read_metrics(folder / METRICS_FILE)
    ]
    return [line for line in lines if "eval/loss" not in line or line["step"] == evaluated_at]


def test_metrics_are_means_over_all_steps_since_the_last_line(recipe: Path, tmp_path: Path) -> None:
    """Evaluations and checkpoints between two lines cost no losses."""
    train_run(recipe, tmp_path / "each")
    train_run(
        recipe, tmp_path / "fifth", "train.log_every=5", "train.eval_every=3", "train.save_every=4"
    )
    losses = [
        line["train/loss"]
        for line in read_metrics(tmp_path / "each" / METRICS_FILE)
        if "train/loss" in line
    ]
    fifth = [
        line["train/loss"]
        for line in read_metrics(tmp_path / "fifth" / METRICS_FILE)
        if "train/loss" in line
    ]
    assert fifth == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5], rel=1e-6)


def test_the_buckets_of_lsh_are_stored_and_old_runs_get_them(recipe: Path, tmp_path: Path) -> None:
    """Early versions stored 0, and chose the number by the length of each text."""
    settings = ("model.mixer.kind=lsh", "model.mixer.chunk=2", "model.max_length=100")
    train_run(recipe, tmp_path, *settings, "train.steps=4", stop_at=2)
    (checkpoint,) = find_checkpoints(tmp_path)
    for folder in (tmp_path, checkpoint):
        text = (folder / CONFIG_FILE).read_text()
        assert "buckets: 8\n" in text
        (folder / CONFIG_FILE).write_text(text.replace("buckets: 8\n", "buckets: 0\n"))
    hashes = json.loads((checkpoint / COMMIT).read_text())
    hashes[CONFIG_FILE] = hashlib.sha256((checkpoint / CONFIG_FILE).read_bytes()).hexdigest()
    (checkpoint / COMMIT).write_text(json.dumps(hashes))
    assert load_model(tmp_path).model.blocks[0].mixer.buckets == 8
    assert train_run(recipe, tmp_path, *settings, "train.steps=4")["finished"]


def test_a_run_that_is_done_stays_done(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run")
    before = checkpoint_state(tmp_path / "run")
    assert train_run(recipe, tmp_path / "run")["finished"]
    assert train_run(recipe, tmp_path / "run", "train.steps=4")["finished"]
    assert_same(checkpoint_state(tmp_path / "run"), before)


def test_what_is_not_committed_is_not_there(recipe: Path, tmp_path: Path) -> None:
    """It counts neither for resuming nor for saving: an interrupted copy of step 10 stands where
    the run saves its own.
    """
    checkpoints = tmp_path / "run/checkpoints"
    train_run(recipe, tmp_path / "run", stop_at=5)
    for name in ("step-00000007", "step-00000008.tmp", "step-00000010"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "state.json").write_text("{}")
    (checkpoints / "step-00000008.tmp/COMMITTED").touch()
    train_run(recipe, tmp_path / "run")
    train_run(recipe, tmp_path / "whole")
    assert_same(checkpoint_state(tmp_path / "run"), checkpoint_state(tmp_path / "whole"))
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000005",
        "step-00000007",
        "step-00000010",
        "unfinished-step-00000010",
    ]


def test_a_checkpoint_without_its_marker_is_said(
    recipe: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As where a copy goes on: the steps since the one before it would be lost without a word, and
    the whole run where there is none.
    """
    run = tmp_path / "run"
    train_run(recipe, run, "train.save_every=2", stop_at=4)
    (run / "checkpoints/step-00000004/COMMITTED").unlink()
    bad, _ = examine(capfd, run)
    said = "step-00000004 has no COMMITTED, as if a copy of it were not finished"
    assert any(said in line for line in bad)
    assert load_model(run).step == 2
    assert f"{said}: the checkpoint before it is read" in caplog.text
    prepare(recipe, run)
    assert f"{said}: the run goes on from step 2" in caplog.text
    (run / "checkpoints/step-00000002/COMMITTED").unlink()
    with pytest.raises(ValueError, match="step-00000004 has no COMMITTED.* to begin the run anew"):
        prepare(recipe, run)


def test_a_run_that_begins_anew_over_its_metrics_says_so(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the disk of its checkpoints is not mounted."""
    train_run(recipe, tmp_path, stop_at=4)
    assert "begins anew" not in caplog.text
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    train_run(recipe, tmp_path, stop_at=2)
    said = f"{METRICS_FILE} went to step 4, but there is no checkpoint: the run begins anew"
    assert said in caplog.text


def test_the_newest_checkpoints_are_kept(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", "train.save_every=2", "train.keep=3")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (6, 8, 10)
    ]


def test_a_damaged_metrics_file_costs_only_its_damaged_lines(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", stop_at=5)
    file = tmp_path / "run" / METRICS_FILE
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(
        b"".join(
            [
                lines[0],
                b"\xff\xfe\x00 {\n",
                *lines[1:3],
                b"3\n",
                b"{}\n",
                *lines[3:],
                b'{"step": 6, "tra',
            ]
        )
    )
    train_run(recipe, tmp_path / "run")
    assert [line["step"] for line in read_metrics(file)] == [*range(1, 11), 10]


def test_a_run_that_is_beyond_its_steps_says_so(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=5")
    assert main(["train", str(recipe), "--run", str(tmp_path / "run"), "train.steps=3"]) == 0
    out = capfd.readouterr().out
    assert "(resumes at step 5, already beyond train.steps, 3)" in out
    assert f"done: {tmp_path / 'run/checkpoints/step-00000005'}" in out
