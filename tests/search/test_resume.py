"""Journals that a kill cut short, workers that are lost at a bad moment, and reports of searches in
which something failed.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes

from memshard.io import partial_path
from memshard.search.evolve import child, pictures
from memshard.search.evolve.child import Task
from memshard.search.evolve.history import LOSSES
from memshard.search.evolve.journal import JOURNAL_FILE, Event, Journal
from memshard.search.evolve.report import REPORT_FILE, RESULT_FILE, report
from memshard.search.evolve.workers import lost
from tests.search import landscape

SHORT = {"children": 24, "finalists": 1, "size_seeds": 1, "ahead": 2}


def test_a_kill_after_any_birth_of_the_verdict_loses_none(tmp_path: Path) -> None:
    whole = landscape.run_here(tmp_path, **SHORT)
    lines = (tmp_path / JOURNAL_FILE).read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines]
    cuts = [
        number
        for number, event in enumerate(events, start=1)
        if event["event"] == "born" and event["phase"] != "search"
    ]
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
        return [*landscape.work(task), lost(task, "its worker died")]

    history = landscape.run_here(tmp_path, dies, **SHORT)
    assert len(tasks) == len(set(tasks)) and not any(child.lost for child in history.children)


def test_a_start_that_does_not_train_is_refused_in_every_session(tmp_path: Path) -> None:
    landscape.run_here(tmp_path, children=4, finalists=0, sizes=())
    lines = (tmp_path / JOURNAL_FILE).read_text().splitlines(keepends=True)
    done = next(number for number, line in enumerate(lines) if json.loads(line)["event"] == "done")
    (tmp_path / JOURNAL_FILE).write_text("".join(lines[:done]))
    with Journal(tmp_path) as journal:
        journal.write(
            json.loads(lines[done]) | {"status": "crash", "reason": f"{LOSSES} workers died"}
        )
    with pytest.raises(ValueError, match="does not train: crash"):
        landscape.run_here(tmp_path, children=4, finalists=0, sizes=())


def test_strangers_among_the_states_are_removed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "7.safetensors").touch()
    partial_path(state / "3.safetensors").touch()
    (state / "notes.txt").touch()
    landscape.run_here(tmp_path, children=4, finalists=0, sizes=())
    assert [path.name for path in state.iterdir()] == ["notes.txt"], "which is the user's"


def test_a_program_that_hangs_ends_as_timeout(tmp_path: Path) -> None:
    def work(task: Task) -> Iterable[Event]:
        if task.do == "propose" or task.id < 4:
            return landscape.work(task)
        return [lost(task, "gone", silent=task.id % 2 == 0)]

    history = landscape.run_here(tmp_path, work, children=8, finalists=0, sizes=())
    ends = {child.id: child.status for child in history.searched()[4:] if child.lost == LOSSES}
    assert ends and all(status == ("crash" if id % 2 else "timeout") for id, status in ends.items())


def test_a_full_disk_or_another_text_ends_the_search_and_blames_no_program(tmp_path: Path) -> None:
    chosen = landscape.settings(tmp_path)
    for settings, text, reason in (
        (chosen, "of another text", "is not the text any more that the search began with"),
        (replace(chosen, text="gone"), "a text", "there is no text gone"),
    ):
        *_, end = child.work(Task("propose", 0, settings, 1, text=text))
        assert end["event"] == "failed" and reason in end["reason"]

    def work(task: Task) -> Iterable[Event]:
        if task.do == "train" and task.id == 2:
            return [{"event": "failed", "id": 2, "reason": "No space left on device"}]
        return landscape.work(task)

    with pytest.raises(OSError, match="No space left on device: the same command goes on"):
        landscape.run_here(tmp_path, work, children=8, finalists=0, sizes=())
    history = landscape.run_here(tmp_path, children=8, finalists=0, sizes=())
    (tmp_path / "whole").mkdir()
    whole = landscape.run_here(tmp_path / "whole", children=8, finalists=0, sizes=())
    assert landscape.outcome(history) == landscape.outcome(whole)


def test_another_version_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    landscape.run_here(tmp_path, say=said.append, children=4, finalists=0, sizes=())
    journal = tmp_path / JOURNAL_FILE
    journal.write_text(
        journal.read_text().replace(f'"torch":"{torch.__version__}"', '"torch":"0.1"')
    )
    assert not any("begun with" in line for line in said)
    landscape.run_here(tmp_path, say=said.append, children=4, finalists=0, sizes=())
    assert any("begun with {'torch': '0.1'" in line for line in said)


def test_a_report_says_which_trainings_failed_and_is_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(task: Task) -> Iterable[Event]:
        if task.do == "train" and task.size == 2.0 and task.dna == {"number": 0.0}:
            return [{"event": "done", "id": task.id, "status": "oom", "reason": "too large"}]
        return landscape.work(task)

    history = landscape.run_here(tmp_path, work, **SHORT, final_seeds=1)
    assert history.winner() != 0
    monkeypatch.setattr(
        "memshard.search.evolve.report._source", lambda *of: ""
    )  # a number has none
    result = report(history, tmp_path)
    assert (
        result["again"]["0"]["test"]["deviation"] is None
        and "NaN" not in (tmp_path / RESULT_FILE).read_text()
    )
    assert (
        "transformer (start) at 2 times the size, oom (too large)"
        in (tmp_path / REPORT_FILE).read_text()
    )


def test_the_lineage_that_is_drawn_is_the_winners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is so also where that is the start alone."""

    def work(task: Task) -> Iterable[Event]:
        worse = 9.0 if task.verdict and task.dna != {"number": 0.0} else 0.0
        return [
            event | {"loss": event["loss"] + worse} if event["event"] == "rung" else event
            for event in landscape.work(task)
        ]

    drawn: dict[str, list[int]] = {}
    plot = Axes.plot

    def noted(self: Axes, *data: Any, **style: Any) -> Any:
        drawn[style.get("label", "")] = data[0]
        return plot(self, *data, **style)

    monkeypatch.setattr(Axes, "plot", noted)
    history = landscape.run_here(tmp_path, work, **SHORT)
    pictures.history(history, tmp_path / "search.png")
    assert history.winner() == 0 and drawn["lineage of the winner"] == [0]
