"""Experiments of papers: they go on where they stopped, and find what the paper found."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from memshard.experiments.common import catalogue
from memshard.experiments.common.run import RESULTS_FILE, reproduce
from memshard.experiments.fast_weights.retrieval import Retriever, sample_pairs, train
from memshard.launch.cli.main import main
from memshard.models.fast_weights.delta_rule import delta_rule


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path: Path) -> None:
    name, said = "fast_weights/capacity", []
    whole = reproduce(name, "smoke", tmp_path, say=said.append)
    results = tmp_path / RESULTS_FILE
    lines = results.read_text().splitlines()
    results.write_text(lines[0] + "\n" + lines[1][:40])
    again = reproduce(name, "smoke", tmp_path, say=said.append)
    assert "2 points, 1 to run" in " ".join(said)
    assert [row["result"] for row in again["points"]] == [row["result"] for row in whole["points"]]
    assert {"result.json", "report.md", "capacity.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_retrieval_reads_what_the_delta_rule_has_written() -> None:
    """Values and gradients of readings that never build the memory are those of the memory that
    `delta_rule` returns.
    """
    torch.manual_seed(0)
    model = Retriever(12, "dpfp-1", "delta").double()
    keys, values = sample_pairs(12, 24, 3, True, torch.Generator().manual_seed(0))
    queries = keys[:, :5]
    k, q = model.keys_and_queries(keys, values, queries)
    beta = model.strengths(keys, values)
    _, memory = delta_rule(
        k[:, None], k[:, None], F.one_hot(values, 12).double()[:, None], beta[:, None]
    )
    read, expected = model(keys, values, queries), q @ memory[:, 0]
    torch.testing.assert_close(read, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        *(torch.autograd.grad(y.square().sum(), model.parameters()) for y in (read, expected)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "memshard",
        "reproduce",
        "fast_weights/capacity",
        "--scale",
        "full",
        "--workers",
        "1",
    ]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as parent:

        def children() -> list[str]:
            return Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()

        _until(lambda: len(children()) == 2)
        workers = children()
        parent.kill()
    _until(lambda: not any(Path("/proc", worker).exists() for worker in workers))


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("name", catalogue.names())
def test_points_are_distinct_and_as_json_has_them(name: str) -> None:
    experiment = catalogue.find(name)
    for scale in catalogue.SCALES:
        texts = [json.dumps(point, sort_keys=True) for point in experiment.points(scale)]
        assert len(set(texts)) == len(texts) > 0
    assert json.loads(texts[0]) == experiment.points("full")[0]


def test_the_delta_rule_updates_what_the_sum_rule_only_adds_to() -> None:
    """Figure 3: published losses after 300 steps are 0.0065 and, for the sum rule, a plateau of
    0.1.
    """
    point = {"symbols": 20, "features": "dpfp-1", "replace": True, "steps": 300, "seed": 1}
    assert (
        train(point | {"rule": "delta"})["loss"]
        < 0.02
        < 0.07
        < train(point | {"rule": "sum"})["loss"]
    )


def test_an_unknown_experiment_names_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "fast_weights/capacty"]) == 2
    assert "fast_weights/capacity" in capsys.readouterr().err


def test_images_without_data_name_the_command() -> None:
    experiment = catalogue.find("reformer/images")
    with pytest.raises(FileNotFoundError, match="memshard data build IMAGES --images"):
        experiment.run(experiment.points("smoke")[0] | {"data": "nowhere"})


def test_images_are_trained_on_and_completed(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(8):
        Image.new("RGB", (4, 4), (30 * number, 100, 255 - 30 * number)).save(
            tmp_path / f"{number}.png"
        )
    data = str(tmp_path / "data")
    assert (
        main(
            [
                "data",
                "build",
                str(tmp_path),
                "--images",
                "--image-size",
                "4",
                "--held-out",
                "2",
                "--out",
                data,
            ]
        )
        == 0
    )
    experiment = catalogue.find("reformer/images")
    point = experiment.points("smoke")[0] | {"data": data, "run": str(tmp_path / "run"), "steps": 3}
    result = experiment.run(point)
    originals, completed = result["originals"], result["completed"]
    assert len(originals) == 2 and [row[:24] for row in originals] == [
        row[:24] for row in completed
    ]
    assert all(len(row) == 48 and max(row) < 256 for row in completed)
    assert (
        originals[0][1::3] == [100] * 16
        and 0 < result["baseline_bits"] < 8
        and 7 < result["bits"] < 12
    )
    assert (
        "bits a value" in experiment.report([(point, result)], tmp_path)
        and (tmp_path / "images.png").exists()
    )


def test_the_duplication_task_and_its_attentions() -> None:
    """Full attention learns a short copy in seconds; trained with it, many rounds of LSH still do
    it.
    """
    from memshard.experiments.reformer.duplication import sample_copies
    from memshard.experiments.reformer.duplication import train as train_copy

    tokens = sample_copies(5, 3, torch.Generator())
    assert (
        tokens.shape == (3, 12)
        and torch.equal(tokens[:, :6], tokens[:, 6:])
        and not tokens[:, 0].any()
        and tokens[:, 1:6].all()
    )
    point = {
        "attention": "full",
        "lr": 3e-3,
        "seed": 1,
        "words": 3,
        "chunk": 2,
        "dim": 64,
        "heads": 2,
        "batch": 64,
        "steps": 400,
    }
    found = train_copy(point)
    assert found["full"] > 30 > 100 / 127 * 5


def test_parts_of_primer_are_compared_at_equal_parameters(tmp_path: Path) -> None:
    from memshard.experiments.primer.parts import ARMS, reached, source_bytes

    experiment = catalogue.find("primer/parts")
    points = experiment.points("smoke")
    rows = [
        (p, experiment.run(p | {"dim": 96, "steps": 10}))
        for p in points
        if p.get("arm") in ("vanilla", "Transformer++", "Primer")
    ]
    counts = [result["parameters"] for _, result in rows]
    assert counts == pytest.approx([counts[0]] * 3, rel=0.01)
    everything = [
        (points[0] | {"arm": arm}, {"loss": 2.0, "parameters": 5, "curve": [[10, 3.0], [20, 2.0]]})
        for arm in ARMS
    ]
    times = {arm: [3.0, 4.0] if arm == "Primer" else [2.0, 2.0] for arm in ARMS}
    text = experiment.report([*everything, (points[-1], times)], tmp_path)
    assert "| vanilla | GELU | 0 of 1 | +0.0000 |" in text and (tmp_path / "parts.png").exists()
    assert "| Primer | 5 | 2.0000 | +0.0000 | 1.75 (1.50 to 2.00) | 1.00 | 0.57 |" in text
    assert {len(found) for found in experiment.run(points[-1]).values()} == {points[-1]["clock"]}
    curve = [[10, 4.0], [20, 3.0], [30, 3.5], [40, 2.0]]
    assert (
        reached(curve, 3.0) == 20
        and reached(curve, 2.5) == 35
        and reached(curve, 5.0) == 10
        and reached(curve, 1.9) is None
    )
    train, held_out = source_bytes()
    assert len(train) > 5 * len(held_out) > 500_000 and int(train.max()) < 256
