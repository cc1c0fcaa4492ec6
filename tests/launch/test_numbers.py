"""Numbers of the command line and of launchers' variables that make no sense cost one line and exit
code 2, before anything is loaded.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from memshard.data_pipeline.format.remote import BlockCache
from memshard.launch.cli.main import command_parser
from memshard.models.kernels.backend import backend_for
from tests.trainer.test_bad_input import refused


@pytest.mark.parametrize(
    "argv",
    [
        "eval CKPT --length 0",
        "eval CKPT --limit 0 --tasks x",
        "eval CKPT --max-tokens 0",
        "eval CKPT --stride -1",
        "eval CKPT --batch 99999999999999999999",
        "eval CKPT --length-penalty nan",
        "generate CKPT --prompt a --seed 18446744073709551616",
        "generate CKPT --prompt a --seed -1",
        "generate CKPT --prompt a --temperature nan",
        "generate CKPT --prompt a --topp inf",
        "generate CKPT --prompt a --topk 0",
        "generate CKPT --prompt a --beam 0",
        "data build SRC --out OUT --held-out inf",
        "data build SRC --out OUT --test nan",
        "data build SRC --out OUT --vocab 0",
        "data build SRC --out OUT --workers 0",
        "data build SRC --out OUT --page-seconds nan",
        "data build SRC --out OUT --shard-bytes 0",
        "data build SRC --out OUT --seed -1",
        "plan quickstart --world 0",
        "plan quickstart --node 0",
        "plan quickstart --vocab 0",
        "plan quickstart --duplicates 0",
        "plan quickstart --duplicates inf",
        "train quickstart --stop-at 0",
        "launch local quickstart --ranks 0",
        "launch local quickstart --restarts -1",
        "launch slurm quickstart --array 0",
        "launch slurm quickstart --chain 0",
        "launch slurm quickstart --nodes 0",
        "import SRC OUT --topk 0",
        "reproduce pkm/headline --workers 0",
        "search run DIR --workers 0",
        "search compile primer --dim 0 --out OUT",
        "bench product-topk --tokens 0",
        "bench lsh --lengths 8 0",
    ],
)
def test_a_number_without_sense_is_named(
    argv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SRC").write_text("a\n")
    message = refused(capfd, *argv.split())
    flag = [word for word in argv.split() if word.startswith("--")][-1]
    flag = {"--out": "--dim", "--tasks": "--limit"}.get(flag, flag)
    assert f"{flag.removeprefix('--')} is " in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["SRC"]


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _options(inner)
        else:
            yield action


def test_no_number_is_taken_unchecked() -> None:
    """Whole numbers and others have a range; what decides by itself stands here."""
    checked_elsewhere = {"--local_rank", "--stop-at", "--image-size", "--held-out", "--test"}
    checked_elsewhere |= {"--nodes", "--gpus", "--ranks", "--cpus", "--notice"}  # by Cluster
    unchecked = {
        action.option_strings[0]
        for action in _options(command_parser())
        if action.type in (int, float)
    }
    assert unchecked <= checked_elsewhere


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("RANK= WORLD_SIZE=", "the environment variable RANK is ''"),
        ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE is 'two'"),
        ("RANK=2 WORLD_SIZE=2", "RANK is 2 and WORLD_SIZE 2"),
        ("RANK=-1 WORLD_SIZE=2", "RANK is '-1'"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=x", "LOCAL_RANK is 'x'"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=abc", "MASTER_PORT is 'abc'"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=70000", "MASTER_PORT is 70000"),
        ("SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=x", "SLURM_PROCID is 'x'"),
        ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=x", "OMPI_COMM_WORLD_SIZE is 'x'"),
    ],
)
def test_a_variable_without_sense_is_named(
    variables: str,
    message: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    assert message in refused(capfd, "train", recipe, "--run", tmp_path / "run")
    assert message in refused(capfd, "generate", tmp_path, "--prompt", "a")


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("LOCAL_WORLD_SIZE=x", "LOCAL_WORLD_SIZE is 'x'; expected a number from 1 on"),
        ("LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE is '0'; expected a number from 1 on"),
        ("MEMSHARD_KERNELS=Plain", "MEMSHARD_KERNELS is 'Plain'; expected 'plain'"),
    ],
)
def test_a_variable_of_training_without_sense_is_named(
    variable: str,
    message: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    backend_for.cache_clear()
    monkeypatch.setenv(*variable.split("="))
    assert message in refused(capfd, "train", recipe, "--run", tmp_path / "run")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("MEMSHARD_CACHE_BYTES=64G", "MEMSHARD_CACHE_BYTES is '64G'; expected a number"),
        ("MEMSHARD_CACHE={folder}/file", "file is a file, and no folder"),
        ("MEMSHARD_CACHE={folder}/open", "open belongs to another user, or everybody can write"),
    ],
)
def test_a_cache_that_cannot_be_used_is_named(
    variables: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("MEMSHARD_CACHE", str(tmp_path / "cache"))
    for variable in variables.format(folder=tmp_path).split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(ValueError, match=message):
        BlockCache("http://127.0.0.1:1/data")
