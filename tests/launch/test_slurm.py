"""Jobs of a real SLURM, from scripts that `memshard launch slurm` wrote. Judged by what the runs
wrote, never by a job's state alone.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memshard.launch.launchers.cluster import Cluster
from memshard.launch.launchers.slurm import Job, render
from memshard.launch.launchers.start import Start
from memshard.trainer.checkpoint.folders import committed
from memshard.trainer.config.load import dump, load_recipe
from memshard.trainer.watch.heartbeat import read_beats
from tests.distributed import run_distributed
from tests.launch.runs import LONG, SHORT, STEPS, wait_for_step
from tests.launch.slurm_cluster import SlurmCluster, missing_programs
from tests.trainer.tiny_run import assert_same, checkpoint_state, numbers, train_run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as cluster:
        yield cluster


def _launch(cluster: SlurmCluster, *arguments: object, nodes: int = 2) -> list[str]:
    """Launch, and return the numbers of the jobs."""
    command = [
        sys.executable,
        "-m",
        "memshard",
        "launch",
        "slurm",
        *map(str, arguments),
        "--nodes",
        str(nodes),
        "--json",
    ]
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    jobs: list[str] = json.loads(done.stdout)["jobs"]
    return jobs


def _output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "log").glob("slurm-*.out")))


def _wait_for_checkpoint(folder: Path, beyond: int, timeout: float = 120) -> int:
    """Return the step of the newest checkpoint, once there is one beyond a step."""
    deadline = time.monotonic() + timeout
    while (
        not (
            steps := [
                int(path.name.partition("-")[2]) for path in committed(folder / "checkpoints")
            ]
        )
        or steps[-1] <= beyond
    ):
        assert time.monotonic() < deadline, (
            f"no checkpoint beyond {beyond} after {timeout} s: {_output(folder)}"
        )
        time.sleep(0.05)
    return steps[-1]


def test_a_run_that_is_preempted_twice_is_the_undisturbed_one(
    cluster: SlurmCluster, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """It is preempted by SLURM's own requeue, then by a notice."""
    folder = tmp_path / "run"
    (job,) = _launch(cluster, recipe, *LONG, "--run", folder)
    wait_for_step(folder, 30)
    cluster.run("scontrol", "requeue", job)
    first = _wait_for_checkpoint(folder, 29)
    assert first < STEPS
    wait_for_step(folder, first + 30)
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    second = _wait_for_checkpoint(folder, first + 29)
    assert second < STEPS
    cluster.wait_for_end(job)
    assert "Restarts=2 " in cluster.run("scontrol", "show", "job", job)
    output = _output(folder)
    assert (
        output.count(f"run          {folder} (") == 3
        and f"resumes at step {second}, to step {STEPS}" in output
    )
    assert output.count("launcher     SLURM") == 3
    assert {beat.rank: beat.ended for beat in read_beats(folder)} == {0: "done", 1: "done"}
    assert_same(checkpoint_state(folder), checkpoint_state(undisturbed / "long"))
    assert numbers(folder, "train/loss") == numbers(undisturbed / "long", "train/loss")


def _train(rank: int, world: int, recipe: Path, folder: Path, steps: int) -> None:
    train_run(recipe, folder, f"train.steps={steps}")


def test_a_run_that_meets_its_time_limit_is_the_undisturbed_one(
    cluster: SlurmCluster, recipe: Path, tmp_path: Path
) -> None:
    """SLURM looks at limits every 30 s, and gives notice at the last look before it would be late:
    here 15 to 45 s after the start.

    What is left to train is cut short then, in the recipe that the job reads when it starts again.
    """
    folder = tmp_path / "run"
    slow = ("train.steps=100000", "train.eval_every=1")
    (job,) = _launch(cluster, recipe, *slow, "--run", folder, "--time", "1", "--notice", "15")
    stopped = _wait_for_checkpoint(folder, 0, timeout=240)
    snapshot = folder / "recipe.yaml"
    snapshot.write_text(dump(load_recipe(snapshot, [f"train.steps={stopped + 20}"])))
    cluster.wait_for_end(job, timeout=300)
    assert "Restarts=0 " not in cluster.run("scontrol", "show", "job", job)
    assert f"(resumes at step {stopped}, to step {stopped + 20})" in _output(folder)
    run_distributed(_train, 2, recipe, tmp_path / "undisturbed", stopped + 20, timeout=300)
    assert_same(checkpoint_state(folder), checkpoint_state(tmp_path / "undisturbed"))
    assert numbers(folder, "train/loss") == numbers(tmp_path / "undisturbed", "train/loss")


def test_a_cancelled_job_saves_and_can_go_on_with_fewer_nodes(
    cluster: SlurmCluster, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (job,) = _launch(cluster, recipe, "train.steps=100000", "--run", folder)
    wait_for_step(folder, 10)
    cluster.run("scancel", job)
    deadline = time.monotonic() + 60
    while cluster.state(job) in ("RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "JobState=CANCELLED" in cluster.run("scontrol", "show", "job", job)
    assert {beat.ended for beat in read_beats(folder)} == {"stopped"}
    saved = _wait_for_checkpoint(folder, 9)
    (job,) = _launch(cluster, recipe, f"train.steps={saved + 5}", "--run", folder, nodes=1)
    cluster.wait_for_end(job)
    assert "ranks: 1" in _output(
        folder
    ) and f"(resumes at step {saved}, to step {saved + 5})" in _output(folder)
    assert {(beat.rank, beat.ended) for beat in read_beats(folder)} == {(0, "done")}


@pytest.mark.parametrize("flavour", ["torchrun", "deepspeed"])
def test_a_notice_passes_through_a_launcher(
    flavour: str, cluster: SlurmCluster, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (job,) = _launch(cluster, recipe, *LONG, "--run", folder, "--flavour", flavour)
    wait_for_step(folder, 20)
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    assert _wait_for_checkpoint(folder, 19) < STEPS
    cluster.wait_for_end(job)
    assert (
        _output(folder).count(
            f"launcher     {'torchrun' if flavour == 'torchrun' else 'DeepSpeed'}"
        )
        == 2
    )
    assert_same(checkpoint_state(folder), checkpoint_state(undisturbed / "long"))


def test_turns_of_an_array_and_a_chain(
    cluster: SlurmCluster, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The second turn finds a finished run."""
    for name, option in (("array", "--array"), ("chain", "--chain")):
        folder = tmp_path / name
        jobs = _launch(cluster, recipe, *SHORT, "--run", folder, option, 2)
        assert len(jobs) == (2 if name == "chain" else 1)
        cluster.wait_for_end(jobs[-1])
        assert len(list((folder / "log").glob("slurm-*.out"))) == 2
        assert_same(checkpoint_state(folder), checkpoint_state(undisturbed / "short"))
        assert "(resumes at step 20, to step 20)" in _output(folder)


def test_hostile_names_reach_sbatch_as_they_are(cluster: SlurmCluster, tmp_path: Path) -> None:
    """bash parses each script, and sbatch's jobs get the name, working directory and log
    that were meant.
    """
    names = [
        "my runs",
        "it's",
        'say "x"',
        "a#b",
        "100%j",
        "50%",
        "x;y$(z)`w`",
        "[1]*?",
        "-n",
        "ünï",
    ]
    jobs = {}
    for name in names:
        folder = tmp_path / name
        (folder / "log").mkdir(parents=True)
        start = Start(str(folder / "recipe.yaml"), (), str(folder), str(folder / "code"))
        script = render(Job(start=start, cluster=Cluster(), workdir=str(folder)))
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0, name
        path = folder / "whole.sh"
        path.write_text(script)
        cluster.run("sbatch", "--test-only", str(path))
        header = script[: script.index("\n\n")]
        path.write_text(f'{header}\necho "$SLURM_JOB_NAME"; pwd\n')
        jobs[name] = cluster.run("sbatch", "--parsable", str(path)).strip()
    for name, job in jobs.items():
        cluster.wait_for_end(job)
        log = tmp_path / name / "log" / f"slurm-{job}.out"
        assert log.read_text() == f"memshard-{name}\n{tmp_path / name}\n"
