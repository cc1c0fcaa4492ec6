"""Real signals to real commands: whatever ends a run, the next start goes on as if
nothing had happened.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from memshard.launch.cli.main import main
from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.stop_signal import StopSignal
from memshard.trainer.watch.metrics import METRICS_FILE
from tests.trainer.tiny_run import assert_same, checkpoint_state, numbers, train_run

ENDLESS = "train.steps=100000"

Start: TypeAlias = Callable[..., "subprocess.Popen[str]"]


def _wait_for_step(
    folder: Path, step: int, process: "subprocess.Popen[str]", timeout: float = 60
) -> None:
    deadline = time.monotonic() + timeout
    while not (
        (folder / METRICS_FILE).exists() and max(numbers(folder, "train/loss"), default=0) >= step
    ):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no step {step} after {timeout} s"
        time.sleep(0.01)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts commands, and ends those that a failed test leaves behind."""
    processes = []

    def start(*command: object, **options: Any) -> "subprocess.Popen[str]":
        line = [sys.executable, "-m", *map(str, command)]
        processes.append(
            subprocess.Popen(
                line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()  # torchrun must live to end its ranks
            process.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(
    number: signal.Signals, start: Start, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    process = start(
        "memshard",
        "train",
        recipe,
        "optimizer.betas=[0.9, 0.95]",
        "--run",
        folder,
        ENDLESS,
        "--json",
    )
    _wait_for_step(folder, 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    result = json.loads(out)
    step = result["step"]
    assert [path.name for path in committed(folder / "checkpoints")] == [f"step-{step:08d}"]

    resume = shlex.split(result["stopped"].partition("resume with: ")[2])
    assert resume[:2] == ["memshard", "train"]
    assert err.count(f"memshard: stopped: {result['stopped']}") == err.count("resume with") == 1
    more = f"train.steps={step + 3}"
    assert main([*resume[1:], more]) == 0
    train_run(recipe, tmp_path / "whole", "optimizer.betas=[0.9, 0.95]", more)
    assert_same(checkpoint_state(folder), checkpoint_state(tmp_path / "whole"))
    assert numbers(folder, "train/loss") == numbers(tmp_path / "whole", "train/loss")
    assert (folder / METRICS_FILE).read_text().count("train/loss") == step + 3


def test_a_signal_to_all_processes_of_a_run_that_reads_ahead_saves(
    start: Start, recipe: Path, tmp_path: Path
) -> None:
    """As batch systems send it: readers that end would end the run in the middle of its save."""
    process = start(
        *("memshard", "train", recipe, "--run", tmp_path / "run", ENDLESS, "data.workers=2"),
        start_new_session=True,
    )
    _wait_for_step(tmp_path / "run", 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert len(committed(tmp_path / "run/checkpoints")) == 1


def test_a_run_under_nohup_hears_no_hangup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_kill_9_costs_only_the_steps_since_the_last_checkpoint(
    start: Start, recipe: Path, tmp_path: Path
) -> None:
    """Saving after every other step takes most of the time, so kills hit it, too: at step 10
    checkpoint 8 may still be on its way.
    """
    folder, draw = tmp_path / "run", random.Random(0)
    for reached in (5, 10, 15):
        process = start("memshard", "train", recipe, "--run", folder, ENDLESS, "train.save_every=2")
        _wait_for_step(folder, reached, process)
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.communicate()
        checkpoints = committed(folder / "checkpoints")
        assert checkpoints and checkpoint_state(folder)["progress"]["step"] >= reached - 4
    steps = f"train.steps={checkpoint_state(folder)['progress']['step'] + 2}"
    train_run(recipe, folder, steps)
    train_run(recipe, tmp_path / "whole", steps)
    assert_same(checkpoint_state(folder), checkpoint_state(tmp_path / "whole"))
    losses = numbers(tmp_path / "whole", "train/loss")
    assert numbers(folder, "train/loss") == losses
    assert (folder / METRICS_FILE).read_text().count("train/loss") == len(losses)


def test_ctrl_c_under_torchrun_stops_all_ranks_at_one_step(
    start: Start, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "--")
    process = start(
        *torchrun, "memshard", "train", recipe, "--run", folder, ENDLESS, start_new_session=True
    )
    _wait_for_step(folder, 3, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("memshard: stopped: at step ") == 1 and "memshard: error" not in err, err
    (checkpoint,) = committed(folder / "checkpoints")
    step = checkpoint_state(checkpoint)["progress"]["step"]
    assert f"memshard: stopped: at step {step} of 100000, saved; resume with: memshard train" in err
    assert max(numbers(folder, "train/loss")) == step

    train_run(recipe, folder, f"train.steps={step + 2}")
    train_run(recipe, tmp_path / "whole", f"train.steps={step + 2}")
    assert list(numbers(folder, "train/loss").values()) == pytest.approx(
        list(numbers(tmp_path / "whole", "train/loss").values()), rel=1e-3
    )


def test_only_a_second_ctrl_c_aborts() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR2)
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGUSR2):
            os.kill(os.getpid(), number)
            assert stop.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR2)) == before
