"""The runs that real launchers start, which must end as the same runs on two plain processes do."""

import time
from pathlib import Path

from memshard.trainer.watch.metrics import METRICS_FILE
from tests.trainer.tiny_run import numbers, train_run

STEPS = 250
LONG = (f"train.steps={STEPS}", "train.eval_every=0", "train.save_every=1000", "optimizer.lr=3e-3")
SHORT = ("train.steps=20",)


def train_undisturbed(rank: int, world: int, recipe: Path, folder: Path) -> None:
    """Train both runs without a disturbance."""
    train_run(recipe, folder / "long", *LONG)
    train_run(recipe, folder / "short", *SHORT)


def wait_for_step(folder: Path, step: int, timeout: float = 120) -> None:
    """Wait until a run has finished a step."""
    deadline = time.monotonic() + timeout
    while not (
        (folder / METRICS_FILE).exists() and max(numbers(folder, "train/loss"), default=0) >= step
    ):
        logs = [path.read_text()[-2000:] for path in (folder / "log").glob("*.out")]
        assert time.monotonic() < deadline, f"no step {step} after {timeout} s: {logs}"
        time.sleep(0.05)
