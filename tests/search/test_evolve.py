"""Evolution: what it breeds from, what it stops, and that no kill and no number of workers changes
what it finds.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from memshard.lock import LOCK_FILE
from memshard.search.evolve.history import History, saving, stops
from memshard.search.evolve.journal import JOURNAL_FILE, Journal, read
from memshard.search.evolve.run import load
from memshard.search.evolve.settings import Settings, load_settings
from tests.search import landscape


def _kill_at(folder: Path, events: int, workers: int, children: int, of: str) -> None:
    """Start a search and kill -9 it, or one of its workers, once its journal has so many events;
    wait for its end.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.search.landscape", str(folder), str(workers), str(children)]
    )
    deadline = time.monotonic() + 120
    while len(read(folder)) < events:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    below = [
        child
        for child in psutil.Process(process.pid).children()
        if "resource_tracker" not in " ".join(child.cmdline())
    ]
    if of == "worker":
        os.kill(random.choice(below).pid, signal.SIGKILL)
        assert process.wait(timeout=120) == 0
    else:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not psutil.wait_procs(below, timeout=30)[1], "workers live on after their search"


def test_the_same_history_with_any_number_of_workers_and_after_any_kill(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "three", "killed")]
    for folder in folders:
        folder.mkdir()
    one, three = (
        landscape.run(folders[0], 1, children=80),
        landscape.run(folders[1], 3, children=80),
    )
    assert landscape.outcome(one) == landscape.outcome(three)
    _kill_at(folders[2], 150, 2, 80, "search")
    with (folders[2] / JOURNAL_FILE).open("a") as journal:
        journal.write('{"event":"rung","id":1')  # as if the kill had come within a line
    _kill_at(folders[2], 220, 2, 80, "worker")
    killed = load(folders[2])
    assert landscape.outcome(killed) == landscape.outcome(one)
    assert one.winner() != 0
    assert {child.phase for child in one.children} == {"search", "final", "lineage", "size"}


def test_a_search_finds_better_programs_and_its_hurdles_save_what_theory_says(
    tmp_path: Path,
) -> None:
    history = landscape.run(
        tmp_path, 2, children=400, population=40, tournament=8, ahead=8, hurdles=3, sizes=()
    )
    start = statistics.fmean(child.fitness for child in history.children[:4])
    assert history.children[history.winner()].fitness < start - 0.5
    met = [
        c for c in history.searched() if None not in c.hurdles and c.status in ("full", "hurdle")
    ]
    assert 150 / statistics.fmean(child.spent for child in met) == pytest.approx(saving(3), rel=0.2)
    # Every program at a hurdle passed if and only if it was not above it.
    for child in met:
        passed = [
            rung.loss <= hurdle
            for rung, hurdle in zip(child.rungs, child.hurdles, strict=False)
            if hurdle is not None
        ]
        assert all(passed[:-1]) and passed[-1] == (child.status == "full")


def test_without_order_every_finished_program_counts_at_once_and_a_resumed_search_ends(
    tmp_path: Path,
) -> None:
    _kill_at(tmp_path, 30, 2, 60, "search")
    journal = tmp_path / JOURNAL_FILE
    lines = journal.read_text().splitlines()
    first = json.loads(lines[0])
    first["settings"]["deterministic"] = False
    journal.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    history = landscape.run(tmp_path, 2, deterministic=False)
    assert not history.living() and landscape.outcome(load(tmp_path)) == landscape.outcome(history)
    assert all(
        child.parent in history.ended[: history.ended.index(child.id)]
        for child in history.searched()
        if child.parent
    )


def test_published_hurdles() -> None:
    """So et al. 2021: 4 hurdles in 25,200 s stop after 812.9, 2438.7, 5690.3 and 12193.5 s, and
    save a factor of 6.2.
    """
    seconds = [25_200 * share for share in stops(Settings("text", hurdles=4))]
    assert seconds == pytest.approx([812.9, 2438.7, 5690.3, 12193.5, 25200], abs=0.1) and saving(
        4
    ) == pytest.approx(6.2)


def test_parents_are_the_best_of_a_tournament_among_the_latest() -> None:
    """With losses in order of birth, the parent of rank r among P is drawn with the probability of
    the lowest of S draws.
    """
    settings = Settings(
        "text", children=4000, copies=100, population=100, tournament=10, hurdles=0, ahead=1
    )
    history = History(settings)
    ranks: Counter[int] = Counter()
    for id in range(settings.children):
        (birth,) = history.next_births()
        history.apply(birth)
        history.apply(
            {"event": "rung", "id": id, "rung": 0, "step": 1, "loss": float(id), "seconds": 0.0}
        )
        history.apply({"event": "done", "id": id, "status": "full"})
        if id >= 100:
            assert birth["parent"] >= id - 100
            ranks[birth["parent"] - (id - 100)] += 1
    # P(lowest of 10 without replacement has rank 0) = 0.1, rank below 7 = 1 - C(93, 10) / C(100,
    # 10) = 0.528.
    assert ranks[0] / 3900 == pytest.approx(0.1, abs=0.02) and sum(
        ranks[r] for r in range(7)
    ) / 3900 == pytest.approx(0.528, abs=0.03)


def test_a_second_search_in_the_folder_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        Journal(tmp_path)


def test_a_search_whose_folder_was_taken_over_writes_nothing(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the lock sends as well
    try:
        with Journal(tmp_path) as journal:
            journal.write({"event": "ours"})
            owner = json.loads((tmp_path / LOCK_FILE).read_text())
            (tmp_path / LOCK_FILE).write_text(json.dumps({**owner, "token": "another"}))
            with pytest.raises(RuntimeError, match="belongs to another process now"):
                journal.write({"event": "too late"})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert read(tmp_path) == [{"event": "ours"}]


def test_another_search_in_the_folder_is_refused(tmp_path: Path) -> None:
    landscape.run(tmp_path, 1, children=6, finalists=0, sizes=())
    with pytest.raises(ValueError, match="population 12, not 13"):
        landscape.run(tmp_path, 1, children=6, finalists=0, sizes=(), population=13)
    (tmp_path / "text").write_bytes(b"another" * 5000)
    with pytest.raises(ValueError, match="another text"):
        landscape.run(tmp_path, 1, children=6, finalists=0, sizes=())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text=a", "populaton=5"], "did you mean 'population'"),
        ([], "text is required"),
        (["text=a", "children=3.5"], "children is 3.5"),
        (["text=a", "tournament=99"], "tournament is 99"),
        (["text=a", "hurdles"], "expected key=value"),
        (["text=a", "final_seeds=0"], "final_seeds is 0"),
        (["text=a", "sizes=[0.5, -1.0]"], "sizes is"),
        (["text=a", "timeout=.nan"], "timeout is nan"),
        (["text=a", "lr=.inf"], "lr is inf; it must be finite"),
        (["text=a", "mutations=[1, 1, .nan, 1, 1, 1]"], "mutations is .* must be finite"),
    ],
)
def test_wrong_settings_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(None, overrides)
