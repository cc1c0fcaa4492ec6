"""What a run does about a loss that jumps, on all ranks alike."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from memshard.data_pipeline.stream.batch import Batch
from memshard.trainer.carried_states import Carried
from memshard.trainer.guards import is_spike
from memshard.trainer.loop import train
from memshard.trainer.run import Run
from memshard.trainer.tasks.language_model import LanguageModelTask
from tests.distributed import run_distributed
from tests.trainer.tiny_run import assert_same, checkpoint_state, numbers, prepare, train_run

SETTINGS = (
    "guards.window=4",
    "train.save_every=4",
    "train.steps=12",
    "model.memory.query_norm=lagged",
)
BAD = 6
"""The batch whose loss jumps on the last rank: that of step 7."""


@dataclass(frozen=True, kw_only=True)
class _SpikyTask(LanguageModelTask):
    """Ten times the loss, and the gradient, on some batches; on the last rank only."""

    run: Run
    bad: frozenset[int]

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        step: int | None = None,
        carried: Carried | None = None,
    ) -> Tensor:
        spikes = (
            step is not None
            and self.run.rank == self.run.ranks - 1
            and self.run.progress.batch in self.bad
        )
        return super().loss(model, batch, step, carried) * (10.0 if spikes else 1.0)


def _spiky(
    recipe: Path, folder: Path, policy: str, *overrides: str, bad: Iterable[int] = (BAD,)
) -> Run:
    run = prepare(recipe, folder, *SETTINGS, f"guards.loss_spike={policy}", *overrides)
    run.task = _SpikyTask(**vars(run.task), run=run, bad=frozenset(bad))
    return run


def _without_counters(folder: Path) -> dict[str, Any]:
    state = checkpoint_state(folder)
    counters = {
        name: state["progress"].pop(name) for name in ("skipped", "spikes", "rewinds", "rewound_to")
    }
    assert counters["spikes"] in (0, 1)
    return state


def _each_policy(rank: int, world: int, recipe: Path, folder: Path) -> list[int]:
    results = []
    for policy in ("warn", "skip", "rewind"):
        train(_spiky(recipe, folder / policy, policy))
        # Stopped right after the spike, and later resumed.
        train(_spiky(recipe, folder / f"{policy}, stopped", policy), stop_at=9)
        results.append(train(_spiky(recipe, folder / f"{policy}, stopped", policy))["step"])

    skipping = prepare(recipe, folder / "without", *SETTINGS)
    train(skipping, stop_at=BAD)
    skipping.progress.step += 1
    train(skipping)
    jumping = prepare(recipe, folder / "past it", *SETTINGS)
    train(jumping, stop_at=4)
    jumping.progress.left_out = BAD + 1 - 4
    train(jumping)
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_each_policy_does_what_it_says(
    world: int, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if world == 1:
        assert _each_policy(0, 1, recipe, tmp_path) == [12, 12, 12]
    else:
        assert run_distributed(_each_policy, 2, recipe, tmp_path) == [[12, 12, 12]] * 2
    for policy in ("warn", "skip", "rewind"):
        assert_same(
            checkpoint_state(tmp_path / f"{policy}, stopped"), checkpoint_state(tmp_path / policy)
        )
        assert checkpoint_state(tmp_path / policy)["progress"]["spikes"] == 1
    losses = numbers(tmp_path / "warn", "train/loss")
    assert (
        losses[BAD + 1] > 2 * losses[BAD] and numbers(tmp_path / "warn", "train/skipped")[12] == 0
    )
    assert_same(_without_counters(tmp_path / "skip"), _without_counters(tmp_path / "without"))
    assert numbers(tmp_path / "skip", "train/lr")[BAD + 1] == 0
    assert_same(_without_counters(tmp_path / "rewind"), _without_counters(tmp_path / "past it"))
    # The branch that was left has left no lines.
    assert list(numbers(tmp_path / "rewind", "train/loss")) == list(range(1, 13))
    assert numbers(tmp_path / "rewind", "train/rewinds")[12] == 1
    err = capfd.readouterr().err
    for end in (
        "trained on all the same",
        "not trained on",
        "going back\nback to step 4, rewind 1 of 5",
    ):
        assert f"step 7: loss {losses[BAD + 1]:.4f} against a median of " in err and end in err


def test_a_second_rewind_goes_further_back_and_too_many_end_the_run(
    recipe: Path, tmp_path: Path
) -> None:
    """All batches from the one of step 11 on are bad: the run goes back to step 8, of whose next
    step it says the same, back to step 4, and once more.
    """
    run = _spiky(
        recipe, tmp_path / "run", "rewind", "guards.rewinds=2", "train.keep=9", bad=range(10, 30)
    )
    with pytest.raises(
        RuntimeError,
        match=r"^the loss spiked again at step 5 after 2 rewinds \(guards.rewinds\): begin",
    ):
        train(run)
    assert run.progress.rewound_to == 4
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step-00000000",
        "step-00000004",
    ]


def test_skipping_does_not_go_on_for_ever(recipe: Path, tmp_path: Path) -> None:
    run = _spiky(recipe, tmp_path / "run", "skip", "train.max_skipped=2", bad=range(BAD, 30))
    with pytest.raises(RuntimeError, match=r"^3 steps in a row, up to step 9, had .* a loss spike"):
        train(run)


def test_what_is_a_spike() -> None:
    draw = random.Random(0)
    noise = [draw.gauss(3.0, 0.1) for _ in range(2000)]
    flagged = sum(is_spike(loss, noise[i : i + 64], 6.0) for i, loss in enumerate(noise[64:]))
    assert flagged == 0
    assert is_spike(3.8, noise[:64], 6.0) and not is_spike(1.0, noise[:64], 6.0)
    # Half the window may be spikes; a constant loss has no deviation of its own.
    assert is_spike(9.0, [*noise[:34], *[20.0] * 30], 6.0)
    assert not is_spike(3.1, [3.0] * 64, 6.0) and is_spike(3.2, [3.0] * 64, 6.0)


def test_guards_are_free_to_change_on_resume(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=2")
    assert (
        train_run(
            recipe, tmp_path / "run", "train.steps=3", "guards.loss_spike=skip", "guards.window=2"
        )["step"]
        == 3
    )
