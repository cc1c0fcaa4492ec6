"""What stands in a run's folder, or beside it, is looked at before it is believed, waited for or
written over: several people may write there.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memshard.data_pipeline.format.index import sha256_file
from memshard.data_pipeline.tokenizer import Tokenizer, train_tokenizer
from memshard.launch.cli.main import main
from tests.launch.test_doctor import examine
from tests.trainer.test_bad_input import refused
from tests.trainer.tiny_run import train_run


@pytest.fixture
def run(run_and_export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_and_export / "run", tmp_path / "run"))


@pytest.mark.parametrize("kind", ["pipe", "endless", "nothing"])
def test_a_lock_that_nobody_wrote_is_not_waited_for(
    kind: str, run: Path, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A link to nothing could be neither made nor read, again and again, at full speed."""
    if kind == "pipe":
        os.mkfifo(run / "lock")
    else:
        (run / "lock").symlink_to("/dev/zero" if kind == "endless" else "/nonexistent/lock")
    assert ": remove it" in refused(capfd, "train", recipe, "--run", run)
    assert os.path.lexists(run / "lock")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "log/rank0.log", "heartbeat"])
def test_a_pipe_in_place_of_a_runs_file_is_not_waited_for(
    name: str, run: Path, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).parent.mkdir(exist_ok=True)
    os.mkfifo(run / name)
    assert name in refused(capfd, "train", recipe, "--run", run)


def test_heartbeats_and_records_of_others_are_passed_over(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sound = {"rank": 0, "ranks": 1, "host": "h", "pid": 1, "step": 1, "phase": "saving"}
    sound |= {"since": 0.0, "time": 0.0, "interval": 1.0}
    (run / "heartbeat").mkdir(exist_ok=True)
    (run / "flight").mkdir()
    wrong = [{"ranks": 10**12}, {"rank": "x"}, {"step": -1}, {"phase": "?"}, {"since": "x"}]
    for number, fields in enumerate(wrong):
        (run / f"heartbeat/rank{number}.json").write_text(json.dumps(sound | fields))
    os.mkfifo(run / "heartbeat/rank9.json")
    for number, text in enumerate(("5", '{"entries": 5}', '{"entries": [{}]}', "[" * 100_000)):
        (run / f"flight/rank{number}.json").write_text(text)
    os.mkfifo(run / "flight/rank9.json")
    bad, notes = examine(capfd, run)
    assert not bad and "no heartbeats: the run has not started" in notes


def test_a_checkpoint_that_was_renamed_is_not_believed(
    run: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under a later step's name it would be taken for the newest, and its step for that one."""
    train_run(recipe, run, "train.steps=2")
    root = run / "checkpoints"
    (root / "step-00000001").rename(root / "step-00000900")
    said = "step-00000900 is damaged (it was saved at step 1, and renamed)"
    assert said in refused(capfd, "export", root / "step-00000900", tmp_path / "out")
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "out: step 2," in capfd.readouterr().out
    bad, _ = examine(capfd, run)
    assert said in bad[0]
    assert train_run(recipe, run, "train.steps=3")["step"] == 3
    assert (root / "damaged-step-00000900").is_dir()


@pytest.mark.parametrize("command", ["train", "search"])
def test_a_file_in_place_of_a_folder_is_named(
    command: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("my thesis")
    (tmp_path / "text").write_text("some text\n" * 4000)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name, said in (("mine", "is a file"), ("link", "is a link to nothing")):
        argv: tuple[object, ...] = ("train", recipe, "--run", tmp_path / name)
        if command == "search":
            argv = ("search", "run", tmp_path / name, f"text={tmp_path / 'text'}")
        assert f"{tmp_path / name} {said}, and no folder" in refused(capfd, *argv)
    assert (tmp_path / "mine").read_text() == "my thesis"


def test_checkpoints_that_lead_nowhere_are_noticed_at_the_start(
    run: Path, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to("/nonexistent/disk")
    message = refused(capfd, "train", recipe, "--run", run)
    assert "run/checkpoints is a link to nothing" in message


def test_a_name_that_is_no_text_is_refused(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "is no UTF-8 text" in refused(capfd, "train", recipe, "--run", f"{tmp_path}/x\udcff")


def test_control_sequences_in_names_do_not_reach_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = refused(capfd, "generate", tmp_path / "\x1b[2Jx", "--prompt", "a")
    assert "\\x1b[2Jx does not exist" in message and "\x1b" not in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a/b.": "a_b."}, "two memories for the folder a_b"),
        ({"keys": torch.tensor(1.0)}, r"keys of shape \[\]"),
        ({"keys": torch.zeros(2, 2, 4, 0)}, r"keys of shape \[2, 2, 4, 0\]"),
        ({"values.weight": torch.zeros(16, 32, dtype=torch.complex64)}, "is torch.complex64"),
    ],
)
def test_hostile_memories_are_refused_whole(
    change: dict[str, Any], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of two memories with one folder's name the second would replace the first."""
    tensors = {
        "keys": torch.randn(2, 2, 4, 8),
        "values.weight": torch.randn(16, 32),
        "query_proj.0.weight": torch.randn(32, 32),
    }
    name, other = next(iter(change.items()))
    if isinstance(other, str):
        tensors = {f"{place}{part}": t for place in (name, other) for part, t in tensors.items()}
    else:
        tensors[name] = other
    file = tmp_path / "f.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    assert re.search(said, refused(capfd, "import", file, tmp_path / "out", "--topk", 2))
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_tokenizer_and_a_model_of_other_sizes(
    run_and_export: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One token more than the model has would be looked up beyond its embedding; one that only the
    model has is no text.
    """
    assert Tokenizer(data).decode([5, 300, 10**9]) == Tokenizer(data).decode([5])
    text = "".join(f"word{number} {chr(200 + number)}\n" for number in range(300))
    folder = Path(shutil.copytree(run_and_export / "export", tmp_path / "export"))
    (folder / "tokenizer.model").write_bytes(train_tokenizer([text], 700))
    about = json.loads((folder / "config.json").read_text())
    about["memshard"]["files"]["tokenizer.model"] = sha256_file(folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps(about))
    message = refused(capfd, "generate", folder, "--prompt", "word299")
    assert "has a tokenizer of 700 tokens and a model of 300" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float64, torch.complex64])
def test_an_export_of_other_dtypes_is_refused(
    dtype: torch.dtype, run_and_export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An int8 table has a scale for each of its rows."""
    folder = Path(shutil.copytree(run_and_export / "export", tmp_path / "export"))
    weights = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
    if dtype == torch.int8:
        tensors["model.blocks.0.memory.values.scale"] = torch.ones(3)
    save_file(tensors, weights)
    about = json.loads((folder / "config.json").read_text())
    about["memshard"]["sha256"] = sha256_file(weights)
    (folder / "config.json").write_text(json.dumps(about))
    message = refused(capfd, "generate", folder, "--prompt", "a")
    assert "does not fit its recipe" in message and f"is {dtype} there" in message
