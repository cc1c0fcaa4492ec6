"""Journals that a kill cut short, and workers that are lost at a bad moment."""

import json
import shutil
from pathlib import Path

import pytest

from memshard.search.evolve.child import Task
from memshard.search.evolve.history import LOSSES
from memshard.search.evolve.journal import JOURNAL_FILE, Event, Journal
from memshard.search.evolve.workers import lost
from tests.search import landscape

SHORT = {"children": 24, "finalists": 1, "size_seeds": 1, "ahead": 2}


def test_a_kill_after_any_birth_of_the_verdict_loses_none(tmp_path: Path) -> None:
    whole = landscape.run_here(tmp_path, **SHORT)
    lines = (tmp_path / JOURNAL_FILE).read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines]
    cuts = [number for number, event in enumerate(events, start=1) if event["event"] == "born" and event["phase"] != "search"]
    assert {events[cut - 1]["phase"] for cut in cuts} == {"final", "lineage", "size"}
    for cut in cuts:
        folder = tmp_path / str(cut)
        folder.mkdir()
        shutil.copy(tmp_path / "text", folder)
        (folder / JOURNAL_FILE).write_text("".join(lines[:cut]))
        assert landscape.outcome(landscape.run_here(folder, **SHORT)) == landscape.outcome(whole)


def test_a_worker_lost_after_its_last_word_changes_nothing(tmp_path: Path) -> None:
    tasks: list[tuple[str, int]] = []

    def dies(task: Task) -> list[Event]:
        tasks.append((task.do, task.id))
        return [lost(task, "its worker died")]

    history = landscape.run_here(tmp_path, dies, **SHORT)
    assert len(tasks) == len(set(tasks)) and not any(child.lost for child in history.children)


def test_a_start_that_does_not_train_is_refused_in_every_session(tmp_path: Path) -> None:
    landscape.run_here(tmp_path, children=4, finalists=0, sizes=())
    lines = (tmp_path / JOURNAL_FILE).read_text().splitlines(keepends=True)
    done = next(number for number, line in enumerate(lines) if json.loads(line)["event"] == "done")
    (tmp_path / JOURNAL_FILE).write_text("".join(lines[:done]))
    with Journal(tmp_path) as journal:
        journal.write(json.loads(lines[done]) | {"status": "crash", "reason": f"{LOSSES} workers died"})
    with pytest.raises(ValueError, match="does not train: crash"):
        landscape.run_here(tmp_path, children=4, finalists=0, sizes=())


def test_strangers_among_the_states_are_removed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "7.safetensors").touch()
    (state / "3.1234").touch()
    landscape.run_here(tmp_path, children=4, finalists=0, sizes=())
    assert not list(state.iterdir())
