"""Runs on pairs, images, mixtures and damaged data."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from memshard.data_pipeline.format import load_index
from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.format.shards import read_sidecar
from memshard.data_pipeline.prepare.images import build_images
from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.trainer.watch.heartbeat import FOLDER
from tests.data_pipeline.conftest import ORDERS
from tests.trainer.tiny_run import RECIPE, numbers, rewrite_config, train_run


def recipe_for(data: Path, folder: Path, extra: str = "") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(
        RECIPE.format(data=data)
        .replace("length: 32", f"length: 48{extra}")
        .replace("eval_every: 0", "eval_every: 5")
    )
    return file


def test_a_run_on_pairs_resumes(tmp_path: Path) -> None:
    for side in "ab":
        (tmp_path / f"{side}.txt").write_text(
            "\n".join(
                f"{side} sentence {number} " + "word " * (number % 9) for number in range(200)
            )
        )
    build_data(
        Sources((tmp_path / "a.txt", tmp_path / "b.txt"), "pairs"),
        tmp_path / "data",
        vocab_size=300,
        held_out=10,
        workers=1,
    )
    recipe = recipe_for(tmp_path / "data", tmp_path)
    with pytest.raises(ValueError, match="data.order is shuffled, and .* holds whole records"):
        train_run(recipe, tmp_path / "ordered", "data.order=shuffled")
    whole = train_run(recipe, tmp_path / "whole")
    train_run(recipe, tmp_path / "parts", stop_at=4)
    parts = train_run(recipe, tmp_path / "parts")
    assert whole["finished"] and parts["loss"] == whole["loss"]
    losses = numbers(tmp_path / "whole", "train/loss")
    assert losses[10] < losses[1] and 3 < losses[1] < 7, "a mean over the tokens that are predicted"


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_in_any_order_resumes_in_it_and_in_no_other(
    data: Path, tmp_path: Path, order: Order
) -> None:
    recipe = recipe_for(data, tmp_path, f", order: {order}, document_mask: true")
    whole = train_run(recipe, tmp_path / "whole")
    train_run(recipe, tmp_path / "parts", stop_at=4)
    other = "best-fit" if order == "shuffled" else "shuffled"
    with pytest.raises(ValueError, match=f"data.order: {order} there, {other} here"):
        train_run(recipe, tmp_path / "parts", f"data.order={other}")
    parts = train_run(recipe, tmp_path / "parts", "data.workers=1")
    assert whole["finished"] and parts["loss"] == whole["loss"]
    # Padding is no damage.
    assert set(numbers(tmp_path / "whole", "train/masked").values()) == {0.0}


def test_a_run_from_before_there_were_orders_is_contiguous(data: Path, tmp_path: Path) -> None:
    recipe = recipe_for(data, tmp_path)
    train_run(recipe, tmp_path / "run", "data.order=contiguous", stop_at=4)
    rewrite_config(tmp_path / "run", lambda text: re.sub(r" *order: contiguous\n", "", text))
    # Which is how a run of another version is known.
    (tmp_path / "run" / FOLDER).mkdir(exist_ok=True)
    (tmp_path / "run" / FOLDER / "rank0.json").touch()
    with pytest.raises(ValueError, match="data.order: contiguous there, shuffled here"):
        train_run(recipe, tmp_path / "run", "data.order=shuffled")
    assert train_run(recipe, tmp_path / "run", "data.order=contiguous")["finished"]


def test_a_run_on_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(40):
        image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(
            tmp_path / "in" / f"{number}.png"
        )
    build_images(
        [Path(file) for file in find_files([tmp_path / "in"], ["png"])],
        tmp_path / "data",
        size=4,
        held_out=4,
        workers=1,
    )
    assert train_run(recipe_for(tmp_path / "data", tmp_path), tmp_path / "run")["finished"]


def test_a_run_on_a_mixture(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    mixture = json.dumps({str(data): 2.0, str(copy): 1.0})
    whole = train_run(recipe_for(data, tmp_path, f", mixture: {mixture}"), tmp_path / "run")
    assert whole["finished"]
    with pytest.raises(ValueError, match="data.mixture"):
        train_run(recipe_for(data, tmp_path), tmp_path / "run")


def test_a_damaged_document_costs_its_tokens_and_past_the_tolerance_the_run(
    data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    shard = load_index(copy).splits["train"].shards[0]
    offset, tokens, *_ = read_sidecar(copy, shard)[2].tolist()
    content = bytearray((copy / shard.file).read_bytes())
    content[offset : offset + tokens] = bytes(tokens)
    (copy / shard.file).write_bytes(content)
    recipe = recipe_for(copy, tmp_path)
    assert train_run(recipe, tmp_path / "run", "data.damage_tolerance=0.9")["finished"]
    with pytest.raises(RuntimeError, match="train-00000.tar, document 2"):
        train_run(recipe, tmp_path / "other")


def test_printed_losses_leave_damaged_tokens_out_and_say_how_many(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    shard = load_index(copy).splits["train"].shards[0]
    content = (copy / shard.file).read_bytes()
    (copy / shard.file).write_bytes(content[: shard.bytes // 2] + bytes(-(-shard.bytes // 2)))
    recipe, tolerant = recipe_for(copy, tmp_path), "data.damage_tolerance=1"
    train_run(recipe, tmp_path / "run", tolerant)
    masked, losses = (numbers(tmp_path / "run", f"train/{key}") for key in ("masked", "loss"))
    assert any(0.2 < share < 0.8 for share in masked.values())
    # Before it has learnt anything, a model's loss is the logarithm of the vocabulary.
    assert losses[1] == pytest.approx(np.log(load_index(copy).vocab_size), abs=0.3)
    assert f"damaged {masked[1]:.1%}" in capfd.readouterr().err
    train_run(recipe_for(data, tmp_path), tmp_path / "sound")
    assert set(numbers(tmp_path / "sound", "train/masked").values()) == {0.0}
    assert "damaged" not in capfd.readouterr().err
