"""Runs on sentence pairs with an encoder and a decoder: they resume, learn, and split their records
in the right place.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memshard.data_pipeline.prepare.inputs import Sources
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.data_pipeline.stream.batch import IGNORE, make_batch
from memshard.data_pipeline.stream.records import RecordStream
from memshard.launch.cli.main import main
from memshard.trainer.export.export import export
from memshard.trainer.tasks.translation import TranslationTask, split_pairs
from tests.distributed import run_distributed
from tests.trainer.tiny_run import RECIPE, assert_same, checkpoint_state, numbers, train_run

_WORDS = ["eins", "zwei", "drei", "vier", "acht", "neun"]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build data of numbers in words, whose translation is the same words the other way round."""
    folder = tmp_path_factory.mktemp("pairs")
    draw = np.random.default_rng(0)
    rows = [draw.choice(_WORDS, draw.integers(1, 6)).tolist() for _ in range(600)]
    (folder / "a.txt").write_text("\n".join(" ".join(row) for row in rows))
    (folder / "b.txt").write_text("\n".join(" ".join(row[::-1]) for row in rows))
    build_data(
        Sources((folder / "a.txt", folder / "b.txt"), "pairs"),
        folder / "data",
        vocab_size=280,
        held_out=40,
        workers=1,
    )
    return folder / "data"


@pytest.fixture(scope="session")
def recipe(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "translation.yaml"
    text = (
        RECIPE.format(data=pairs)
        .replace("layers: 2", "layers: 2\n  encoder_layers: 1")
        .replace("eval_every: 0", "eval_every: 5")
    )
    path.write_text(
        text.replace("length: 32", "length: 48").replace(
            "batch: 8", "batch: 8, label_smoothing: 0.1"
        )
    )
    return path


def test_a_run_resumes_to_the_last_bit(recipe: Path, tmp_path: Path) -> None:
    whole = train_run(recipe, tmp_path / "whole", "model.mixer.kind=delta")
    train_run(recipe, tmp_path / "parts", "model.mixer.kind=delta", stop_at=4)
    parts = train_run(recipe, tmp_path / "parts", "model.mixer.kind=delta")
    assert whole["finished"] and parts["loss"] == whole["loss"]
    assert_same(checkpoint_state(tmp_path / "whole"), checkpoint_state(tmp_path / "parts"))
    assert 5 < numbers(tmp_path / "whole", "train/loss")[1] < 6, (
        "a mean over target tokens: ln 280 is 5.6"
    )


def _accumulated(rank: int, ranks: int, recipe: Path, folder: Path) -> None:
    train_run(recipe, folder, "train.micro_batch=3", "train.steps=4", "model.memory={layers: []}")


def test_ranks_and_micro_batches_change_nothing_but_rounding(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "one", "train.steps=4", "model.memory={layers: []}")
    run_distributed(_accumulated, 2, recipe, tmp_path / "two")
    one, two = (numbers(tmp_path / name, "train/loss") for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_pairs_are_split_behind_their_source(pairs: Path) -> None:
    stream = RecordStream(pairs, 48, 16, 0)
    source, real, inputs, targets = split_pairs(stream.batch(0, 16), eos=1)
    for row in range(16):
        words, answer = source[row][real[row]], targets[row][targets[row] != IGNORE]
        assert (
            words[-1] == answer[-1] == inputs[row, 0] == 1
            and (words[:-1] != 1).all()
            and (answer[:-1] != 1).all()
        )
        assert torch.equal(inputs[row, 1 : len(answer)], answer[:-1])
    task = TranslationTask(torch.device("cpu"), 1, 0)
    batches = [stream.batch(0, 8), stream.batch(8, 8)]
    assert (
        sum(int(task.loss_tokens(batch)) for batch in batches)
        == sum(int(task.counted(batch).sum()) for batch in batches)
        == int((targets != IGNORE).sum())
    )


def test_rows_without_a_target_predict_nothing() -> None:
    tokens = np.array([[5, 6, 1, 7, 1], [1, 1, 1, 1, 1]])
    batch = make_batch(
        tokens, np.zeros_like(tokens), np.array([[False] * 5, [True] * 5]), np.array([0, -1])
    )
    source, real, inputs, targets = split_pairs(batch, eos=1)
    assert source.tolist() == [[5, 6, 1], [1, 1, 1]] and real.tolist() == [
        [True] * 3,
        [True, False, False],
    ]
    assert inputs[0].tolist() == [1, 7] and targets.tolist() == [[7, 1], [IGNORE, IGNORE]]


def test_text_is_no_task_for_a_translator(data: Path, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asks for translation"):
        train_run(recipe, tmp_path / "run", f"data.path={data}")


def test_commands_evaluate_and_translate(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    train_run(recipe, tmp_path / "run", "train.steps=2")
    run = str(tmp_path / "run")

    def result(*command: str) -> dict[str, Any]:
        capfd.readouterr()
        assert main([*command, "--json"]) == 0
        printed: dict[str, Any] = json.loads(capfd.readouterr().out)
        return printed

    held_out = result("eval", run, "--beam", "1")
    assert (
        5 < held_out["loss"] < 6
        and held_out["tokens"] > 40
        and 0 <= held_out["bleu"] < 50
        and "13a" in held_out["bleu_signature"]
    )
    assert held_out["bleu_margin"] >= 0
    (tmp_path / "a.txt").write_text("eins zwei\nacht\ndrei vier neun\n")
    (tmp_path / "b.txt").write_text("zwei eins\nacht\nneun vier drei\n")
    scored = result("eval", run, "--pairs", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    texts = [
        row["text"]
        for row in result("generate", run, "--prompts", str(tmp_path / "a.txt"))["results"]
    ]
    expected = sacrebleu.corpus_bleu(texts, [(tmp_path / "b.txt").read_text().splitlines()]).score
    assert (
        scored["bleu"] == pytest.approx(expected)
        and [row[1] for row in scored["examples"]] == texts
    )
    assert result("generate", run, "--prompt", "acht")["text"] == texts[1], "alone as in a batch"
    export(tmp_path / "run", tmp_path / "export")
    assert result("generate", str(tmp_path / "export"), "--prompt", "acht")["text"] == texts[1]
    for option in ("--max-tokens=1", "--temperature=0", "--greedy", "--topk=1", "--seed=0"):
        assert main(["generate", run, "--prompt", "acht", option]) == 2
        name = option.partition("=")[0]
        assert f"{name} does nothing with {run}: it is for models that continue text" in (
            capfd.readouterr().err
        )
    (tmp_path / "gap.txt").write_text("acht\n\n")
    assert main(["generate", run, "--prompts", str(tmp_path / "gap.txt")]) == 2
    assert "text 2 of 2 is empty" in capfd.readouterr().err
    assert (
        main(["export", run, str(tmp_path / "hf"), "--huggingface"]) == 2
        and "is for language models" in capfd.readouterr().err
    )
