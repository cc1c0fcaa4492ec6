"""Held-out loss and slot usage against plain loops in fp64."""

import io
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memshard
from memshard.data_pipeline.format.shards import read_sidecar
from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.reader import SplitReader
from memshard.launch.cli.main import main
from memshard.models.memory.peer import Peer
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.slot_usage import UsageReport
from memshard.trainer.checkpoint.load_model import LoadedModel, load_model
from memshard.trainer.evaluation.perplexity import Evaluation, evaluate
from memshard.trainer.export.export import export
from memshard.trainer.tasks.language_model import LanguageModelTask
from tests.data_pipeline.conftest import write_corpus
from tests.distributed import run_distributed
from tests.trainer.tiny_run import TABLE, train_run

LENGTH = 32


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    train_run(recipe, folder)
    return load_model(folder)


def held_out_windows(data: Path) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and targets, [1, length or less], of the held-out text end to end."""
    reader = SplitReader(data, "heldout")
    starts = np.concatenate([[0], np.cumsum(reader.lengths)])
    tokens, *_ = reader.read(np.arange(len(reader.lengths)), starts, np.array([0]), int(starts[-1]))
    pieces = [
        torch.from_numpy(tokens[:, start : start + LENGTH + 1])
        for start in range(0, tokens.shape[1] - 1, LENGTH)
    ]
    return [(piece[:, :-1], piece[:, 1:]) for piece in pieces]


def expected_report(slots: int, reads: list[tuple[Tensor, Tensor]]) -> UsageReport:
    """Compute the spec's formulas, slot by slot, from (rows, weights) of all lookups."""
    weighted, counted = np.zeros(slots), np.zeros(slots)
    for rows, weights in reads:
        np.add.at(weighted, rows.flatten().numpy(), weights.detach().flatten().double().numpy())
        np.add.at(counted, rows.flatten().numpy(), 1.0)

    def divergence(sums: np.ndarray) -> float:
        shares = sums / sums.sum()
        return math.log(slots) + sum(
            share * math.log(share) for share in shares.tolist() if share > 0
        )

    def top(share: float) -> int:
        taken = np.cumsum(np.sort(counted)[::-1])
        return int((taken < share * counted.sum() - 1e-9).sum()) + 1

    pairs = np.abs(counted[:, None] - counted[None, :])
    gini = pairs.sum() / (2 * slots * counted.sum())
    usage, reads = float((counted > 0).mean()), counted.sum() / slots
    return UsageReport(
        usage, divergence(weighted), divergence(counted), reads, gini, top(0.5), top(0.9), top(0.99)
    )


def evaluation(
    trained: LoadedModel, data: Path, rows: int, max_tokens: int | None = None
) -> Evaluation:
    task = LanguageModelTask(torch.device("cpu"), document_mask=False, seed=0)
    return evaluate(
        trained.model, task, HeldOutStream(data, LENGTH, max_tokens), rows, torch.float32
    )


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_held_out_loss_and_usage_are_those_of_a_plain_loop(
    rows: int, trained: LoadedModel, data: Path
) -> None:
    """rows: windows at a time; fillers after the last one must not count."""
    reads: list[tuple[Tensor, Tensor]] = []
    hooks = [
        memory.register_forward_pre_hook(
            lambda layer, args: reads.append(layer.lookup(args[0].flatten(0, -2)))
        )
        for _, memory in trained.model.memories()
    ]
    total = tokens = 0.0
    with torch.no_grad():
        for inputs, targets in held_out_windows(data):
            logits, _ = trained.model(inputs)
            total += float(F.cross_entropy(logits[0].double(), targets[0], reduction="sum"))
            tokens += targets.numel()
    for hook in hooks:
        hook.remove()

    measured = evaluation(trained, data, rows)
    assert measured.tokens == tokens
    assert measured.loss == pytest.approx(total / tokens, rel=1e-6)
    expected = expected_report(64, reads)
    assert vars(measured.usage[TABLE]) == pytest.approx(vars(expected), rel=1e-5)
    assert measured.usage[TABLE].usage == expected.usage and 0 < expected.kl_weighted < math.log(64)


def test_a_limit_cuts_the_text_at_that_token(trained: LoadedModel, data: Path) -> None:
    (inputs, targets), *_ = held_out_windows(data)
    with torch.no_grad():
        logits, _ = trained.model(inputs)
    expected = F.cross_entropy(logits[0, :10], targets[0, :10])
    for rows in (1, 3):
        assert evaluation(trained, data, rows, max_tokens=10).loss == pytest.approx(
            float(expected), rel=1e-6
        )


@pytest.mark.parametrize("stride", [1, 5, 31])
def test_sliding_windows_predict_each_token_once_from_what_precedes_it(
    stride: int, trained: LoadedModel, data: Path
) -> None:
    """A loop takes token by token, with the longest context that a window of 32 gives it."""
    text = torch.cat([inputs[0] for inputs, _ in held_out_windows(data)[:3]])
    total, count = 0.0, 70
    with torch.no_grad():
        for place in range(count):
            begin = 0 if place < LENGTH else (place - LENGTH) // stride * stride + stride
            logits, _ = trained.model(text[None, begin : place + 1])
            total += float(F.cross_entropy(logits[0, -1], text[place + 1]))
    task = LanguageModelTask(torch.device("cpu"), document_mask=False, seed=0)
    stream = HeldOutStream(data, LENGTH, count, stride)
    # One more than there are: a filler window, whose first tokens the last one has predicted.
    measured = evaluate(trained.model, task, stream, stream.windows + 1, torch.float32)
    assert measured.tokens == count and measured.loss == pytest.approx(total / count, rel=1e-5)
    buckets = measured.by_position()
    assert sum(bucket["tokens"] for bucket in buckets) == count
    assert sum(bucket["loss"] * bucket["tokens"] for bucket in buckets) == pytest.approx(
        total, rel=1e-5
    )
    assert [(bucket["first"], bucket["last"]) for bucket in buckets] == [
        (0, 0),
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
        (16, 31),
    ]


def test_slot_usage_of_a_plain_model() -> None:
    """The model may be any, its table an ordinary parameter, batches tensors or mappings; dropout
    is off meanwhile.
    """
    torch.manual_seed(0)
    memory = ProductKeyMemory(8, keys=5, heads=2, topk=3, key_dim=4, query_norm="layer")
    model = nn.Sequential(nn.Dropout(0.5), memory)
    batches = [torch.randn(7, 8) for _ in range(3)]
    reads = [memory.lookup(batch) for batch in batches]
    (report,) = memshard.slot_usage(model, batches).values()
    assert vars(report) == pytest.approx(vars(expected_report(25, reads)), rel=1e-6)
    assert model.training and memory.values.observer is None
    (mapped,) = memshard.slot_usage(model, [{"input": batch} for batch in batches]).values()
    assert mapped == report


def test_weights_of_both_signs_count_by_their_magnitude() -> None:
    torch.manual_seed(0)
    peer, batch = Peer(8, keys=5, heads=2, topk=3, key_dim=4, query_norm="layer"), torch.randn(7, 8)
    report = memshard.slot_usage(peer, [batch])["values"]
    rows, weights = peer.lookup(batch)
    hidden = torch.nn.functional.gelu((peer.down.weight[rows] * batch[:, None]).sum(-1))
    assert (hidden < 0).any()
    expected = expected_report(25, [(rows, (weights * hidden).abs())])
    assert report.kl_weighted == pytest.approx(expected.kl_weighted, rel=1e-5)


def test_reads_of_a_single_slot_and_none_at_all() -> None:
    memory = ProductKeyMemory(4, keys=3, heads=1, topk=1, key_dim=2, query_norm="none")
    (report,) = memshard.slot_usage(memory, [torch.zeros(5, 4)]).values()
    assert report.kl_count == pytest.approx(math.log(9)) and report.usage == pytest.approx(1 / 9)
    assert memshard.slot_usage(memory, [])["values"] == UsageReport(0, 0, 0, 0, 0, 0, 0, 0)


def test_usage_leaves_each_part_in_its_mode() -> None:
    """Also a part that was in evaluation mode within a training model."""
    model = nn.Sequential(ProductKeyMemory(4, keys=2, heads=1, topk=1, key_dim=2), nn.Dropout())
    model[0].eval()
    memshard.slot_usage(model, [torch.zeros(5, 4)])
    assert [part.training for part in (model, *model)] == [True, False, True]


def _evaluate_on_ranks(rank: int, world: int, run: Path) -> dict[str, Any]:
    loaded = load_model(run, memmap=True)
    task = LanguageModelTask(torch.device("cpu"), document_mask=False, seed=0)
    evaluation = evaluate(
        loaded.model,
        task,
        HeldOutStream(loaded.recipe.data.path, LENGTH),
        2,
        torch.float32,
        rank,
        world,
    )
    return {
        "loss": evaluation.loss,
        "positions": evaluation.positions,
        **vars(evaluation.usage[TABLE]),
    }


def test_two_processes_measure_what_one_does(trained: LoadedModel, data: Path) -> None:
    """Each maps the whole table, so their counts add up before they are judged."""
    alone = evaluation(trained, data, 4)
    for actual in run_distributed(_evaluate_on_ranks, 2, trained.path):
        assert actual.pop("loss") == pytest.approx(alone.loss, rel=1e-9)
        torch.testing.assert_close(actual.pop("positions"), alone.positions)
        assert actual == pytest.approx(vars(alone.usage[TABLE]), rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_command_measures_the_same_from_memory_from_disk_and_from_an_export(
    precision: str,
    trained: LoadedModel,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    export(trained.path, tmp_path / "out")
    results = []
    for source, options in (
        (trained.path, []),
        (trained.path, ["--memmap"]),
        (tmp_path / "out", ["--data", str(data)]),
        (tmp_path / "out", ["--memmap", "--data", str(data)]),
    ):
        assert (
            main(
                [
                    "eval",
                    str(source),
                    *options,
                    "--precision",
                    precision,
                    "--json",
                    "--max-tokens",
                    "500",
                    "--stride",
                    "16",
                ]
            )
            == 0
        )
        results.append(json.loads(capfd.readouterr().out))
    for result in results[1:]:
        assert result["loss"] == pytest.approx(
            results[0]["loss"], rel=1e-5 if precision == "fp32" else 1e-2
        )
        assert result["tokens"] == 500 and result["usage"][TABLE]["top50"] == pytest.approx(
            results[0]["usage"][TABLE]["top50"], abs=1
        )
    assert main(["eval", str(trained.path), "--length", "64"]) == 2
    assert "--length is 64, but the model has 32 learned positions" in capfd.readouterr().err


def test_several_prompts_are_continued_as_each_alone(
    trained: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A line ends at a line feed alone, and a byte order mark is no text."""
    lines = ["w1 w2\u2028w3", "", "w4\x0cw5\x85"]
    content = "\r\n".join(lines).encode("utf-8-sig") + b"\n"
    (tmp_path / "prompts").write_bytes(content)
    options = ["--greedy", "--max-tokens", "9", "--json"]
    assert (
        main(["generate", str(trained.path), "--prompts", str(tmp_path / "prompts"), *options]) == 0
    )
    results = json.loads(capfd.readouterr().out)["results"]
    assert [result["prompt"] for result in results] == lines
    for result in results:
        assert (
            main(
                ["generate", str(trained.path), "--memmap", "--prompt", result["prompt"], *options]
            )
            == 0
        )
        alone = json.loads(capfd.readouterr().out)
        assert {key: alone[key] for key in result} == result
    with subprocess.Popen(["echo", "w1 w2"], stdout=subprocess.PIPE) as echo:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(echo.stdout))
        assert main(["generate", str(trained.path), "--prompts", "-", *options]) == 0
    assert [row["prompt"] for row in json.loads(capfd.readouterr().out)["results"]] == ["w1 w2"]
    assert main(["generate", str(trained.path), "--prompt", "w1", "--beam", "2"]) == 2
    assert "--beam does nothing with" in capfd.readouterr().err
    assert main(["eval", str(trained.path), "--length-penalty", "0"]) == 2
    assert "--length-penalty does nothing with" in capfd.readouterr().err
    (tmp_path / "prompts").write_bytes(b"caf\xe9\n")
    assert main(["generate", str(trained.path), "--prompts", str(tmp_path / "prompts")]) == 2
    assert "prompts is not UTF-8 text" in capfd.readouterr().err


def test_damaged_text_is_in_no_bits_per_byte(
    trained: LoadedModel, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its bytes and words are still counted, and its tokens are not."""
    write_corpus(tmp_path / "text", seed=7)
    sources = Sources(find_files([tmp_path / "text"]))
    build_data(sources, tmp_path / "data", tokenizer=data, held_out=0.9, workers=1)
    held_out = SplitReader(tmp_path / "data", "heldout")
    shortest = int(held_out.lengths.argmin())
    arguments = ["eval", str(trained.path), "--data", str(tmp_path / "data"), "--json"]
    assert main(arguments) == 0 and "bits_per_byte" in json.loads(capfd.readouterr().out)
    sidecar = read_sidecar(tmp_path / "data", held_out.index.splits["heldout"].shards[0])
    with (tmp_path / "data/heldout-00000.tar").open("r+b") as shard:
        shard.seek(int(sidecar[shortest][0]))
        shard.write(b"\0\0")
    assert main(arguments) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["tokens"] < held_out.lengths.sum() - 1
    assert not {"bits_per_byte", "word_perplexity"} & result.keys()
