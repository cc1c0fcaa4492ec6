"""`memshard search run` and `report` on real text, and workers that die, hang and take
too much memory.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from memshard.launch.cli.main import main
from memshard.search.dna.compile import Compiled, compile_dna
from memshard.search.evolve.child import (
    Task,
    _relative_time,
    flops,
    shape,
    start_dna,
    work,
)
from memshard.search.evolve.child_training import ChildTraining
from memshard.search.evolve.journal import read
from memshard.search.evolve.run import StartFailed, load
from memshard.search.evolve.settings import Settings, load_settings
from memshard.search.evolve.text import read_text
from memshard.search.evolve.workers import Processes, Workers
from memshard.trainer.config.load import load_recipe
from tests.data_pipeline.conftest import largest_file
from tests.search.landscape import outcome

TEXT = Path(__file__).parents[3] / "shared" / "data" / "text" / "tinyshakespeare.txt"
TINY = [
    *(
        "children=16",
        "copies=2",
        "population=6",
        "tournament=3",
        "hurdles=1",
        "free=3",
        "budget=40",
        "step_costs=flops",
        "layers=1",
    ),
    *(
        "length=16",
        "batch=4",
        "eval_tokens=1024",
        "parameters=[12000,17000]",
        "finalists=1",
        "ancestors=1",
        "final_seeds=2",
    ),
    *("sizes=[2.0]", "size_seeds=1"),
]


@dataclass(frozen=True)
class Job:
    """A task for `misbehave`."""

    id: int
    do: str


def misbehave(job: Job) -> Iterator[dict]:
    """Yield one event, then do what the job asks for."""
    yield {"event": "begun", "id": job.id}
    if job.do == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.do == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        time.sleep(1000)
    if job.do == "eat":
        try:
            torch.ones(2**31)
        except RuntimeError as error:
            yield {"event": "refused", "id": job.id, "why": str(error)}
    yield {"event": "done", "id": job.id}


def _events(workers: Workers, jobs: list[Job]) -> dict[int, list[str]]:
    """Return the events of each job, until all have ended."""
    by_job: dict[int, list[str]] = {job.id: [] for job in jobs}
    try:
        for job in jobs:
            workers.submit(job)
        deadline = time.monotonic() + 400
        while (
            not all(events and events[-1] in ("done", "lost") for events in by_job.values())
            and time.monotonic() < deadline
        ):
            for event in workers.poll(0.5):
                by_job[event["id"]].append(event["event"])
    finally:
        workers.close()
    return by_job


def test_a_worker_that_dies_hangs_or_eats_costs_only_its_task() -> None:
    jobs = [
        Job(0, "work"),
        Job(1, "die"),
        Job(2, "hang"),
        Job(3, "eat"),
        Job(4, "work"),
        Job(5, "work"),
    ]
    actual = _events(Processes(misbehave, 2, timeout=5, memory=2), jobs)
    assert actual == {
        0: (fine := ["begun", "done"]),
        1: ["begun", "lost"],
        2: ["begun", "lost"],
        3: ["begun", "refused", "done"],
        4: fine,
        5: fine,
    }


_STUCK = """
from tests.search.test_search_run import Job, misbehave
from memshard.search.evolve.workers import Processes
if __name__ == "__main__":
    workers = Processes(misbehave, 1, timeout=1000, memory=None)
    workers.submit(Job(0, "hang"))
    while not workers.poll(1.0):
        pass
    print("stuck", flush=True)
    workers.poll(1000)
"""


def test_a_worker_that_is_stuck_ends_with_a_search_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(_STUCK)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "stuck.py")], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"stuck\n"
        workers = psutil.Process(process.pid).children()
        process.kill()
    assert not psutil.wait_procs(workers, timeout=60)[1]


class Hang:
    """Work that a process cannot even read."""

    def __reduce__(self) -> tuple:
        return time.sleep, (1000,)


def test_workers_that_hang_at_their_start_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memshard.search.evolve.workers.START", 0.5)
    hang: Any = Hang()
    workers = Processes(hang, 1, timeout=1000, memory=None)
    with pytest.raises(RuntimeError, match="hang at their start"):
        while True:
            workers.poll(0.5)


def test_the_probe_of_a_slow_step_ends_early_and_shows_signs_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of the start take 1 s, those of the program 30; a budget of 40 steps holds 5 to the
    first stop of programs up to 2.7 s.
    """
    clock = [0.0]

    class Steps:
        def __init__(self, program: Any, *settings: Any) -> None:
            self.seconds = program

        def advance(self) -> None:
            clock[0] += self.seconds

    for name, value in {
        "ChildTraining": Steps,
        "_start": lambda settings: 1.0,
        "_clock": lambda settings: clock[0],
    }.items():
        monkeypatch.setattr(f"memshard.search.evolve.child.{name}", value)
    monkeypatch.setattr("memshard.search.evolve.child._text", lambda *where: None)
    slow: Any = 30.0
    probe = _relative_time(slow, Settings("text"), slowest=2.7)
    assert [next(probe)["event"], next(probe)["event"]] == ["beat", "beat"]
    with pytest.raises(StopIteration) as ratio:
        next(probe)
    assert ratio.value.value == 30.0


@pytest.mark.slow
def test_tasks_that_die_and_hang_on_ray_cost_only_themselves() -> None:
    pytest.importorskip("ray")
    from memshard.search.evolve.ray_workers import RayWorkers

    jobs = [Job(0, "work"), Job(1, "die"), Job(2, "hang"), Job(3, "work")]
    actual = _events(RayWorkers(misbehave, 2, timeout=20, address="local"), jobs)
    assert {id: events[-1] for id, events in actual.items()} == {
        0: "done",
        1: "lost",
        2: "lost",
        3: "done",
    }


@pytest.mark.skipif(not TEXT.exists(), reason="needs shared/data")
def test_a_search_on_real_text_reports_its_verdict(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "search",
                "run",
                str(tmp_path),
                f"text={TEXT}",
                *TINY,
                "children=8",
                "ancestors=0",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capfd.readouterr().out)
    assert (
        result["children"] == 8 and set(result["again"]) >= {"0"} and result["noise"]["runs"] == 2
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "report.md",
        "result.json",
        "winner.json",
        "winner.py",
        "winner.yaml",
        "search.png",
        "curves.png",
        "journal.jsonl",
    } <= names
    text = (tmp_path / "report.md").read_text()
    assert (
        "## Lineage of the winner" in text
        and "## Verdict" in text
        and "class Block(nn.Module)" in text
    )
    assert "It generates with a cache" in text or "It cannot generate" in text
    assert load_recipe(tmp_path / "winner.yaml", ["data.path=x"]).model.program


@pytest.mark.slow
@pytest.mark.skipif(not TEXT.exists(), reason="needs shared/data")
def test_a_search_on_real_text_survives_kills(tmp_path: Path) -> None:
    """From the Transformer, with kill -9 of its workers and of the search, it ends as
    it does without.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["search", "run", str(whole), f"text={TEXT}", *TINY]) == 0
    command = [
        sys.executable,
        "-m",
        "memshard",
        "search",
        "run",
        str(killed),
        "--workers",
        "2",
        f"text={TEXT}",
        *TINY,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for events, victim in ((14, "workers"), (40, "search")):
        while len(read(killed)) < events:
            assert process.poll() is None
            time.sleep(0.01)
        workers = [
            child
            for child in psutil.Process(process.pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        for killed_process in workers if victim == "workers" else [process]:
            killed_process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=60)[1], "workers live on after their search"
    assert main(["search", "run", str(killed), "--workers", "2"]) == 0
    assert outcome(load(killed)) == outcome(load(whole)) and any(
        event["event"] == "lost" for event in read(killed)
    )


@pytest.mark.skipif(not TEXT.exists(), reason="needs shared/data")
def test_a_training_goes_on_from_a_stop_bit_for_bit(tmp_path: Path) -> None:
    settings = load_settings(None, [f"text={TEXT}", *TINY])
    program = compile_dna(start_dna(settings), shape(settings))
    assert isinstance(program, Compiled)
    whole, half, again = (
        ChildTraining(program, settings, read_text(str(TEXT), 16), 1, 2) for _ in range(3)
    )
    for _ in range(3):
        half.advance()
    rungs = [{"rung": 0, "step": 3, "loss": 1.5, "seconds": 0.1}]
    path = tmp_path / "new" / "state.safetensors"
    half.save(path, "this", rungs)
    assert (
        again.load(path, "another") == again.load(tmp_path / "none", "this") == []
        and again.step == 0
    )
    assert again.load(path, "this") == rungs
    losses = [whole.advance() for _ in range(6)]
    assert [again.advance() for _ in range(3)] == losses[3:] and again.loss("valid") == whole.loss(
        "valid"
    )
    with largest_file(1000), pytest.raises(OSError, match="state.safetensors could not be written"):
        half.save(path, "this", rungs)
    path.write_bytes(path.read_bytes()[:1000])
    assert again.load(path, "this") == []


@pytest.mark.skipif(not TEXT.exists(), reason="needs shared/data")
def test_a_state_ahead_of_the_journal_loses_no_rung(tmp_path: Path) -> None:
    settings = load_settings(None, [f"text={TEXT}", *TINY, "hurdles=2", "step_costs=same"])
    task = Task(
        "train",
        0,
        settings,
        3,
        dna=start_dna(settings),
        hurdles=(None, None),
        state=tmp_path / "0.safetensors",
    )

    def told(task: Task) -> Iterator[dict]:
        return (event for event in work(task) if event["event"] != "beat")

    whole = list(told(replace(task, state=None)))
    cut = told(task)
    assert [next(cut)["event"] for _ in range(3)] == ["steps", "rung", "rung"]
    again = list(told(replace(task, steps=whole[0]["steps"])))
    assert [event["event"] for event in again] == ["rung", "rung", "rung", "done"]
    assert [event | {"seconds": 0} for event in again] == [
        event | {"seconds": 0} for event in whole[1:]
    ]
    seconds = [event["seconds"] for event in again[:-1]]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "name a folder"),
        (["run", "DIR"], "text is required"),
        (["run", "DIR", "text=nowhere.txt"], "there is no text nowhere.txt"),
        (["run", "DIR", "text=a", "childern=3"], "did you mean 'children'"),
        (["run", "DIR", "--workers", "0", "text=a"], "--workers is 0"),
        (["report", "DIR"], "start a search with"),
    ],
)
def test_mistakes_end_with_the_fix(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *(str(tmp_path) if word == "DIR" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(StartFailed("the start does not train"), 2), (ValueError("a bug"), 1)]
)
def test_only_mistakes_are_told_as_such(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*of: Any) -> None:
        raise error

    monkeypatch.setattr("memshard.search.evolve.run._loop", fails)
    (tmp_path / "text").write_bytes(b"abcdefghij" * 1000)
    assert main(["search", "run", str(tmp_path / "run"), f"text={tmp_path / 'text'}"]) == code


@pytest.mark.skipif(not TEXT.exists(), reason="needs shared/data")
def test_floating_point_operations_are_those_of_the_matrix_products() -> None:
    """The Transformer has 2 forward a token and weight, and 4 a pair and channel of attention,
    which the fused kernel must not hide.
    """
    settings = load_settings(None, [f"text={TEXT}", *TINY])
    program = compile_dna(start_dna(settings), shape(settings))
    assert isinstance(program, Compiled)
    text = read_text(str(TEXT), settings.length)
    tokens, width = settings.batch * settings.length, program.config.dim
    weights = tokens * (12 * width * width + width * text.vocabulary)
    pairs = settings.batch * settings.length**2 * width
    # Backward: twice the products of weights, and 5 products of pairs, one of which computes the
    # scores again.
    assert flops(program, settings, text) == 6 * weights + (4 + 10) * pairs
