"""What a run writes down, and what is measured from outside, are the same numbers."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from memshard.launch.cli.main import main
from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.optim.dense.schedule import learning_rate
from memshard.trainer.watch.metrics import METRICS_FILE, read_metrics
from tests.trainer.tiny_run import TABLE, numbers, train_run

TRAINING = {
    *(f"train/{name}" for name in ("loss", "lr", "grad_norm", "masked")),
    *(f"train/{name}" for name in ("skipped", "spikes", "rewinds")),
    *(f"speed/{name}" for name in ("tokens_per_s", "step_s", "mfu", "data_wait")),
    *(f"{TABLE}/{name}" for name in ("touched", "duplicates", "never_updated", "dead")),
}
EVALUATION = {
    *("eval/loss", "eval/perplexity"),
    *(
        f"{TABLE}/{name}"
        for name in (
            "usage",
            "kl_weighted",
            "kl_count",
            "reads_per_slot",
            "gini",
            "top50",
            "top90",
            "top99",
        )
    ),
}
SAVE = {"speed/save_s"}
WHEN_COMMITTED = "speed/save_total_s"
"""On the next line after a save is committed, behind training."""


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was resumed at step 4, after lines up to step 6 had been written."""
    folder = tmp_path_factory.mktemp("metrics") / "run"
    train_run(recipe, folder, "train.eval_every=4", "train.save_every=2", stop_at=6)
    (folder / "checkpoints/step-00000006/COMMITTED").unlink()
    train_run(recipe, folder, "train.eval_every=4", "train.save_every=2")
    return folder


def test_lines_hold_the_documented_numbers(run: Path) -> None:
    lines = read_metrics(run / METRICS_FILE)
    expected = []
    for step in range(1, 11):
        expected += (
            [(step, TRAINING)]
            + [(step, EVALUATION)] * (step in (4, 8, 10))
            + [(step, SAVE)] * (step % 2 == 0)
        )
    assert [(line["step"], set(line) - {"step", WHEN_COMMITTED}) for line in lines] == expected
    # Of the save at step 6 at the latest when the one at step 8 has waited for it.
    assert any(WHEN_COMMITTED in line for line in lines if line["step"] > 6)
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
        if "train/loss" in line:
            assert line["train/skipped"] == 0 and line["train/grad_norm"] > 0
            assert line["speed/tokens_per_s"] * line["speed/step_s"] == pytest.approx(8 * 32)
            assert 0 < line["speed/mfu"] < 1 and 0 < line["speed/data_wait"] < 1
            # 8 x 32 tokens, 2 layers, 2 heads, topk 3, on 64 slots
            assert line[f"{TABLE}/touched"] * line[f"{TABLE}/duplicates"] * 64 == pytest.approx(
                8 * 32 * 2 * 2 * 3
            )


def test_tensorboard_shows_the_same(run: Path) -> None:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == TRAINING | EVALUATION | SAVE | {WHEN_COMMITTED}
    for key in TRAINING | EVALUATION | SAVE:
        events = {event.step: event.value for event in board.Scalars(key)}
        assert len(events) == len(board.Scalars(key))
        assert events == pytest.approx(numbers(run, key), rel=1e-6), key


def test_eval_repeats_the_last_evaluation(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["eval", str(run), "--json", "--batch", "5"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["step"] == 10
    assert result["loss"] == pytest.approx(numbers(run, "eval/loss")[10], rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    for key, value in result["usage"][TABLE].items():
        assert value == pytest.approx(numbers(run, f"{TABLE}/{key}")[10], rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {0: 0.1, 3: 0.4, 4: 0.4, 99: 0.4}),
        # lr * sqrt(warmup / step), steps counted from 1
        ("inverse_sqrt", {0: 0.1, 3: 0.4, 15: 0.2, 99: 0.08}),
        # from 0.4 down to a quarter of it, halfway through at step 4 + 48
        (
            "cosine",
            {
                0: 0.1,
                3: 0.4,
                4: 0.4,
                52: 0.25,
                99: 0.1 + 0.15 * (1 + math.cos(math.pi * 95 / 96)),
                100: 0.1,
                200: 0.1,
            },
        ),
    ],
)
def test_learning_rates(schedule: str, rates: dict[int, float]) -> None:
    config = OptimizerConfig(lr=0.4, warmup=4, schedule=schedule, final_lr=0.25)  # type: ignore[arg-type]
    assert {step: learning_rate(config, step, 100) for step in rates} == pytest.approx(rates)


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt", "cosine"])
def test_without_warmup_the_first_step_has_the_peak_rate(schedule: str) -> None:
    config = OptimizerConfig(lr=0.4, warmup=0, schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate(config, 0, 100) == pytest.approx(0.4)


def test_every_rank_has_a_log_and_rank_0_has_what_the_terminal_showed(
    recipe: Path, tmp_path: Path
) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "--",
    ]
    train = [
        "memshard",
        "train",
        str(recipe),
        "train.eval_every=0",
        "--run",
        str(tmp_path / "run"),
        "--stop-at",
        "2",
    ]
    subprocess.run([*torchrun, *train], capture_output=True, text=True, timeout=300)
    logs = [(tmp_path / f"run/log/rank{rank}.log").read_text() for rank in (0, 1)]
    for rank, text in enumerate(logs):
        assert f"rank {rank} of 2 starts at step 0" in text
        assert re.search(
            r"INFO .*: step 2: [\d.]+ s a step, [\d.]+ s waiting for data, [\d.]+ s exchanging "
            r"rows\n",
            text,
        )
    assert (
        "parameters   " in logs[0]
        and "step 2/10  loss" in logs[0]
        and "step 2/10  loss" not in logs[1]
    )
    last = [line for line in read_metrics(tmp_path / "run" / METRICS_FILE) if "train/loss" in line][
        -1
    ]
    assert 0 < last["speed/exchange"] < 1
