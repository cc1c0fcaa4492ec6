"""Sizes and structures that a file claims are checked before anything is allocated or walked
through, in bounded time.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from memshard.launch.cli.main import main
from memshard.trainer.checkpoint.index import Chunk, StoredTensor, read_index, write_index
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.checkpoint.save_load import DamagedCheckpoint
from memshard.trainer.config.text import parse
from tests.trainer.test_bad_input import refused
from tests.trainer.tiny_run import rehash, rewrite_config

SECONDS = 20
"""Far above what a refusal takes, far below what went wrong takes."""
BOMB = "a0: &a0 [1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize("folder", ["run/checkpoints/step-00000001", "export"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", 100_000_000),
        ("layers", 4096),
        ("dim", 1 << 20),
        ("dim", 10**30),
        ("keys", 1_000_000),
        ("keys", 10**12),
        ("vocab_size", 1 << 32),
        ("vocab_size", -1),
        ("max_length", 1 << 40),
    ],
)
def test_a_checkpoint_of_absurd_sizes_is_refused_at_once(
    key: str, value: int, folder: str, run_and_export: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(run_and_export / folder, tmp_path / "copy"))
    rewrite_config(path, lambda text: re.sub(rf"(?m)^( +{key}): \d+$", rf"\1: {value}", text))
    begun = time.monotonic()
    for memmap in (False, True):
        with pytest.raises(ValueError, match="does not fit its recipe|limit is|at least 1"):
            load_model(path, memmap)
    assert time.monotonic() - begun < SECONDS


@pytest.mark.parametrize(
    "override", [f"model.layers={10**21}", f"model.dim={10**9}", "model.dim=1048576"]
)
def test_a_recipe_of_absurd_sizes_is_refused_at_once(
    override: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    message = refused(capfd, "train", recipe, override, "--run", tmp_path / "run")
    assert "the limit is" in message or "the dense model needs" in message
    assert time.monotonic() - begun < SECONDS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("[" * 20_000, "nested too deeply"),
        (f"a: {'1' * 60_000}", "a number of 60,000 digits"),
        (f"a: {'x' * 2_000_000}", "2,000,003 characters"),
        *((f"a: !!{kind} 1", "asks for a type") for kind in ("binary", "timestamp", "bool", "set")),
        ("a: !!float ''", "asks for a type"),
        ("a: !!python/object/apply:os.getcwd []", "asks for a type"),
        ('a: "\\ud800"', "is no text"),
        ('a: "b\\0c"', "is no text"),
        ("a: \0", "special characters are not allowed"),
    ],
)
def test_yaml_that_grows_or_is_no_plain_value_is_refused(text: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match=f"mine.yaml.*{message}"):
        parse(text, "mine.yaml")
    assert time.monotonic() - begun < SECONDS


def test_long_words_are_read_in_linear_time() -> None:
    begun = time.monotonic()
    for word in ("1" * 60_000 + "x", "1_" * 30_000 + "x", "." + "1" * 60_000 + "x"):
        assert parse(f"a: {word}", "") == {"a": word}
    assert time.monotonic() - begun < SECONDS
    assert parse("[1e-3, 5., .5, 1_0.2, +1.5e+2, 1:30]", "") == [1e-3, 5.0, 0.5, 10.2, 150, "1:30"]


def _grid(rows: int, columns: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Offsets and sizes of boxes that cover [2 rows, 3 columns]."""
    return [((2 * row, 3 * column), (2, 3)) for row in range(rows) for column in range(columns)]


@pytest.mark.parametrize(("rows", "columns"), [(10_000, 1), (1, 10_000), (100, 100), (1, 1)])
def test_many_chunks_are_checked_in_time(rows: int, columns: int, tmp_path: Path) -> None:
    boxes = _grid(rows, columns)
    (tmp_path / "rank0.bin").write_bytes(bytes(6 * len(boxes)))

    def stored(boxes: list[Any]) -> None:
        chunks = tuple(Chunk("rank0.bin", 0, *box, ("0" * 64,)) for box in boxes)
        write_index(tmp_path, {"x": StoredTensor(torch.int8, (2 * rows, 3 * columns), chunks)})

    begun = time.monotonic()
    stored(boxes[::-1])
    assert len(read_index(tmp_path)["x"].chunks) == len(boxes)
    if len(boxes) > 1:
        stored([*boxes[:-1], boxes[len(boxes) // 3]])  # one twice, and one not at all
        with pytest.raises(ValueError, match="do not cover its shape"):
            read_index(tmp_path)
    assert time.monotonic() - begun < SECONDS


@pytest.mark.parametrize("shape", [[1 << 40, 1 << 40, 0], [1 << 62], [1] * 100])
def test_an_empty_tensor_of_an_overflowing_shape_is_refused(
    shape: list[int], tmp_path: Path
) -> None:
    entry = {"dtype": "int8", "shape": shape, "chunks": []}
    (tmp_path / "index.json").write_text(json.dumps({"version": 1, "tensors": {"x": entry}}))
    with pytest.raises(ValueError, match="entry of x is malformed"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[1]", "[" * 100_000, '{"progress": []}'),
        *(
            f'{{"progress": {{"step": {step}}}}}'
            for step in ("null", "-1", "Infinity", "1.5", '"1"')
        ),
    ],
)
def test_a_malformed_state_is_named(
    text: str, run_and_export: Path, tmp_path: Path, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(run_and_export / "run", tmp_path / "run"))
    checkpoint = run / "checkpoints/step-00000001"
    (checkpoint / "state.json").write_text(text)
    rehash(checkpoint, "state.json")
    said = r"step-00000001 is damaged \(state.json (is no|says that)"
    with pytest.raises(DamagedCheckpoint, match=said):
        load_model(run)
    for argv in (
        ("generate", run, "--prompt", "a"),
        ("train", recipe, "--run", tmp_path / "new", f"init_from={run}"),
        ("train", recipe, "--run", run),
    ):
        assert re.search(said, refused(capfd, *argv))


@pytest.mark.parametrize(
    "part",
    [
        *({"progress": {"left_out": value}} for value in (-1, 1 << 80, 1.5, "x")),
        {"progress": {"losses": ["x"]}},
        *({"table_steps": value} for value in ({}, [], "ab", {"blocks.0.memory.values": -3})),
        *({"loss_scale": value} for value in (None, {"value": "x"})),
    ],
)
def test_numbers_that_no_run_has_are_damage(
    part: dict[str, Any],
    run_and_export: Path,
    tmp_path: Path,
    recipe: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(run_and_export / "run", tmp_path / "run"))
    checkpoint = run / "checkpoints/step-00000001"
    state = json.loads((checkpoint / "state.json").read_text())
    for name, value in part.items():
        state[name] = state[name] | value if name == "progress" else value
    (checkpoint / "state.json").write_text(json.dumps(state))
    rehash(checkpoint, "state.json")
    assert "step-00000001 is damaged (state.json" in refused(capfd, "train", recipe, "--run", run)


@pytest.mark.parametrize("name", ["COMMITTED", "index.json"])
def test_deep_json_in_a_checkpoint_is_damage(
    name: str, run_and_export: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_and_export / "run", tmp_path / "run"))
    (run / "checkpoints/step-00000001" / name).write_text("[" * 100_000)
    if name != "COMMITTED":
        rehash(run / "checkpoints/step-00000001", name)
    with pytest.raises(DamagedCheckpoint, match="nested too deeply"):
        load_model(run)


def test_deep_json_elsewhere_is_an_error_of_the_file(
    run_and_export: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run_and_export / "export", tmp_path / "export"))
    (folder / "config.json").write_text("[" * 100_000)
    assert f"{folder} is damaged" in refused(capfd, "generate", folder, "--prompt", "a")
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    (copy / "index.json").write_text("[" * 100_000)
    assert "index.json is damaged (nested too deeply)" in refused(capfd, "data", "verify", copy)
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    argv = ("data", "build", tmp_path / "deep.jsonl", "--out", tmp_path / "out")
    assert main([str(word) for word in argv]) == 2
    assert "deep.jsonl, line 1" in (err := capfd.readouterr().err) and "nested too deeply" in err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("vocab_size", 10**21), ("vocab_size", "x"), ("eos_id", 300), ("eos_id", -1)),
        *(("tokenizer_sha256", value) for value in (5, "../../../../x")),
    ],
)
def test_numbers_of_a_data_folder_are_checked(
    key: str, value: object, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    fields = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(fields | {key: value}))
    said = "is no SHA-256" if key == "tokenizer_sha256" else "vocab_size is"
    message = refused(capfd, "data", "verify", copy)
    assert "index.json is damaged (" in message and said in message


@pytest.mark.parametrize("kind", ["pipe", "endless"])
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        *(("run/checkpoints/step-00000001", name) for name in ("COMMITTED", "state.json")),
        *(("run/checkpoints/step-00000001", name) for name in ("config.yaml", "index.json")),
        *(("export", name) for name in ("config.yaml", "tokenizer.model")),
    ],
)
def test_what_is_no_file_is_not_waited_for(
    kind: str, folder: str, name: str, run_and_export: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(run_and_export / folder, tmp_path / "copy"))
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"is damaged .*{name} is no file"):
        load_model(path)


def test_verification_opens_nothing_outside_the_folder(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    fields = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(fields | {"tokenizer": "../../etc/passwd"}))
    assert "only plain names inside the folder" in refused(capfd, "data", "verify", copy)
