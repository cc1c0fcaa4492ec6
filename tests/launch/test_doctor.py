"""What `memshard doctor` finds in runs and machines with something wrong."""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from memshard.launch.cli.main import main
from memshard.trainer.watch.heartbeat import Beat
from memshard.trainer.watch.metrics import METRICS_FILE
from tests.trainer.tiny_run import train_run


def examine(
    capfd: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[list[str], list[str]]:
    capfd.readouterr()
    code = main(["doctor", *map(str, arguments), "--json"])
    result = json.loads(capfd.readouterr().out)
    assert result["well"] == (not result["bad"]) == (code == 0)
    assert code in (0, 1) and ("error" in result) == (code == 1)
    return result["bad"], result["notes"]


def test_a_run(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    train_run(recipe, folder, "train.save_every=5")
    bad, notes = examine(capfd, folder, "--deep")
    good = [f"{folder}/checkpoints/step-{step:08d} is good" for step in (10, 5)]
    assert not bad and "no heartbeats: the run has not started" in notes and set(good) < set(notes)

    (folder / "checkpoints/step-00000015.tmp").mkdir()
    (folder / "checkpoints/step-20-is-best.txt").touch()  # the user's, of which nothing is said
    piece = max(
        (folder / "checkpoints/step-00000010").glob("*.bin"), key=lambda path: path.stat().st_size
    )
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 1
    piece.write_bytes(content)
    with (folder / METRICS_FILE).open("a") as file:
        for step in range(11, 21):
            file.write(json.dumps({"step": step, "speed/data_wait": 0.6}) + "\n")
    now = time.time()
    beat = Beat(0, 3, "n1", 100, 19, "forward and backward", now - 50, now, 1.0)
    (folder / "heartbeat").mkdir()
    for written in (
        beat,
        replace(beat, rank=1, phase="reading data"),
        replace(beat, rank=2, time=now - 40),
    ):
        path = folder / f"heartbeat/rank{written.rank}.json"
        path.write_text(json.dumps(asdict(written)))
        os.utime(path, (written.time, written.time))
    (folder / "flight").mkdir()
    for rank, number in ((0, 813), (1, 812)):
        entry = {"process_group": ["0", "default_pg"], "collective_seq_id": number}
        entry |= {"profiling_name": "gloo:all_reduce", "input_sizes": [[3]]}
        (folder / f"flight/rank{rank}.json").write_text(json.dumps({"entries": [entry]}))
    bad, notes = examine(capfd, folder, "--deep")
    silent, damaged, waiting = bad
    assert silent.startswith(
        "rank 2 (process 100 on n1), in step 20, forward and backward, has been silent for 4"
    )
    assert (
        damaged.startswith(f"{folder}/checkpoints/step-00000010 is damaged (")
        and "do not match their hash" in damaged
    )
    assert waiting.startswith(
        "60% of the last steps' time went into reading data: raise data.workers"
    )
    assert good[1] in notes and any("step-00000015.tmp is not complete" in note for note in notes)
    assert "is-best" not in str(notes)
    assert any(
        "rank 1 was at collective 812 of group default_pg, others at 813 (gloo:all_reduce" in note
        for note in notes
    )


def test_metrics_of_other_types_are_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    values = ["0.9", [1], {}, None, 10**400, 0.5]
    lines = [{"step": 1, "speed/data_wait": value} for value in values]
    lines += [{"step": 10**400, "speed/data_wait": 0.7, "train/loss": 1}, {"step": "2"}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    bad, _ = examine(capfd, tmp_path)
    assert any(text.startswith("50% of the last steps' time went into reading") for text in bad)


def test_checkpoints_at_a_glance(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train_run(recipe, folder, "train.save_every=5")
    older, newer = (folder / f"checkpoints/step-{step:08d}" for step in (5, 10))
    piece = max(newer.glob("*.bin"), key=lambda path: path.stat().st_size)
    os.truncate(piece, piece.stat().st_size - 1)
    bad, notes = examine(capfd, folder)
    assert (
        len(bad) == 1
        and bad[0].startswith(f"{newer} is damaged (")
        and f"of {piece.name}, which has" in bad[0]
    )
    assert f"{older} is complete, with files as long as they should be (--deep reads them)" in notes


def test_a_folder_that_is_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is no run folder: it holds no config.yaml" in capfd.readouterr().err


def test_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("old/lock", "new/lock"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    os.utime(tmp_path / "old/lock", (time.time() - 3600,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    bad, notes = examine(capfd)
    locks = [text for text in bad if "lock" in text]
    assert locks == [f"{tmp_path}/old/lock is 60 minutes old: if nothing is compiling, delete it"]
    assert any(note.startswith("torch 2.") for note in notes)
    assert any(note.startswith("tables on the CPU: ") for note in notes)
