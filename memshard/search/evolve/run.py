"""Run a search: hand children to workers, write their events into the journal, and decide from the
journal alone what comes next.
"""

import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from memshard.io import is_partial
from memshard.search.evolve.child import FAILED, Task
from memshard.search.evolve.history import LOSSES, Child, History
from memshard.search.evolve.journal import JOURNAL_FILE, Event, Journal, read
from memshard.search.evolve.settings import Settings, from_dict, to_dict
from memshard.search.evolve.text import read_text
from memshard.search.evolve.workers import LOST, Workers

_STATE = r"\d+\.safetensors"
Say = Callable[[str], None]


class StartFailed(ValueError):
    """Raised when the start does not train to its end with these settings."""


def _print(line: str) -> None:
    tqdm.write(line)  # around the progress bar
    sys.stdout.flush()


def search(
    folder: Path, settings: Settings, start_workers: Callable[[], Workers], say: Say = _print
) -> History:
    """Run a search to its end, or go on with the one in `folder`.

    ValueError if that one has other settings or another text.
    """
    digest = read_text(settings.text, settings.length).digest
    with Journal(folder) as journal:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        if not journal.events:
            journal.events.append(
                {
                    "event": "search",
                    "settings": to_dict(settings),
                    "text": digest,
                    "versions": versions,
                }
            )
            journal.write(journal.events[0])
        _same(folder, journal.events[0], settings, digest)
        history = replay(journal.events)
        history.settings = settings  # the text may be in another place now
        _check_start(history)
        states = folder.resolve() / "state"  # workers may run in another folder
        # A kill between the end of a child and the removal of its state leaves a file behind.
        living = {_state(states, child.id) for child in history.living()}
        for path in set(states.glob("*")) - living:
            # The names that writing a state gives; a user's file stays.
            if re.fullmatch(_STATE, path.name) or is_partial(path.name, _STATE):
                path.unlink()
        if len(journal.events) > 1:
            say(
                f"{folder}: going on after {len(history.ended)} of {len(history.children)} programs"
            )
            if (then := journal.events[0]["versions"]) != versions:
                say(
                    f"{folder}: begun with {then}, now {versions}: losses may differ in their "
                    "last digits"
                )
        workers = start_workers()
        try:
            _loop(history, journal, workers, states, say)
        finally:
            workers.close()
    return history


def load(folder: Path) -> History:
    """Return the history of a folder's journal, finished or not."""
    events = read(folder)
    if not events:
        raise FileNotFoundError(
            f"{folder}: there is no {JOURNAL_FILE}; start a search with: memshard search run "
            f"{folder} text=FILE"
        )
    return replay(events)


def replay(events: list[Event]) -> History:
    """Return the history that a journal's events make."""
    history = History(from_dict(events[0]["settings"]), events[0]["text"])
    for event in events[1:]:
        history.apply(event)
    return history


def _loop(history: History, journal: Journal, workers: Workers, states: Path, say: Say) -> None:
    settings = history.settings

    def record(event: Event) -> None:
        journal.write(event)
        history.apply(event)

    most = settings.ahead if settings.deterministic else workers.count
    in_work: dict[int, float] = {}  # share of its steps that each child in work has done

    def hand(child: Child) -> None:
        _hand(history, child, workers, states, record)
        in_work.setdefault(child.id, 0.0)

    for child in history.living():
        hand(child)
    with tqdm(
        total=settings.children,
        initial=len(history.ended),
        unit="program",
        disable=None,
        smoothing=0.05,
    ) as bar:
        while True:
            while len(in_work) < most or len(history.children) >= settings.children:
                births = history.next_births()
                for birth in births:
                    record(birth)
                    hand(history.children[birth["id"]])
                if not births:
                    break
            if not in_work:
                return
            # An event is on disk before anything follows from it, so a killed search goes
            # on from there.
            for event in workers.poll(1.0):
                # A worker that was taken for lost may still report: what is known
                # already changes nothing.
                child = history.children[event["id"]]
                if _known(child, event):
                    continue
                if event["event"] == FAILED:
                    raise OSError(f"{event['reason']}: the same command goes on from here")
                if event["event"] == "beat":
                    in_work[child.id] = event["step"] / event["steps"]
                else:
                    record(event)
                    if event["event"] == LOST:
                        say(f"program {child.id}: {event['reason']}")
                    if event["event"] in (LOST, "program"):
                        hand(child)
            for id in [id for id in in_work if history.children[id].status]:
                del in_work[id]
                _state(states, id).unlink(missing_ok=True)
                child = history.children[id]
                _check_start(history)
                bar.total = max(settings.children, len(history.children))
                bar.update()
                say(_line(child))
            best = history.best(1)
            bar.set_postfix_str(
                f"start {history.children[0].fitness:.3f}, best "
                f"{best[0].fitness if best else float('nan'):.3f}, in work "
                + " ".join(f"{id}:{share:.0%}" for id, share in in_work.items())
            )


def _state(states: Path, id: int) -> Path:
    return states / f"{id}.safetensors"


def _hand(
    history: History, child: Child, workers: Workers, states: Path, record: Callable[[Event], None]
) -> None:
    """Give a child its next task, or end it where none is left."""
    settings = history.settings
    if child.lost >= LOSSES:
        status = "timeout" if child.silent == child.lost else "crash"
        record(
            {
                "event": "done",
                "id": child.id,
                "status": status,
                "reason": f"{child.lost} workers died or hung over it",
            }
        )
        return
    parent = None if child.parent is None else history.children[child.parent]
    if child.phase != "search" and child.dna is None:
        assert parent is not None
        record(
            {
                "event": "program",
                "id": child.id,
                "dna": parent.dna,
                "hash": parent.hash,
                "parameters": parent.parameters,
            }
        )
    if child.dna is None:
        dna, hash = (parent.dna, parent.hash) if parent else (None, "")
        workers.submit(
            Task(
                "propose",
                child.id,
                settings,
                child.seed,
                dna=dna,
                parent_hash=hash,
                text=history.text,
            )
        )
    elif (twin := history.twin(child)) is not None:
        record(
            {
                "event": "done",
                "id": child.id,
                "status": "dup",
                "reason": f"the program of {twin.id}",
            }
        )
    else:
        verdict, hurdles = child.phase != "search", tuple(child.hurdles)
        known = (child.steps, child.cost, _state(states, child.id))
        workers.submit(
            Task(
                "train",
                child.id,
                settings,
                child.seed,
                child.size,
                child.dna,
                "",
                hurdles,
                verdict,
                *known,
                history.text,
            )
        )


def _known(child: Child, event: Event) -> bool:
    """Return whether an event changes nothing: an earlier worker of the child reported the same, or
    its worker died after its last event.
    """
    if event["event"] == LOST and event["do"] == "propose" and child.dna is not None:
        return True
    return bool(child.status) or (event["event"] == "rung" and event["rung"] < len(child.rungs))


def _check_start(history: History) -> None:
    """Raise StartFailed if a copy of the start did not train to its end."""
    for child in history.children[: history.settings.copies]:
        if child.status not in ("", "full"):
            raise StartFailed(
                f"the start, {history.settings.start}, does not train: {child.status} "
                f"({child.reason}); choose other settings"
            )


def _line(child: Child) -> str:
    """Return a line about a finished child."""
    text = f"{time.strftime('%H:%M:%S')} program {child.id} ({child.phase})"
    if child.parent is not None:
        text += f" of {child.parent}" + (f", {child.mutation}" if child.mutation else "")
    if child.rungs:
        text += f": {child.rungs[-1].loss:.4f} after {child.rungs[-1].step} of {child.steps} steps"
    return f"{text}, {child.status}" + (f" ({child.reason})" if child.reason else "")


def _same(folder: Path, first: Event, settings: Settings, digest: str) -> None:
    """Raise ValueError if the search in the folder has other settings or another text."""
    then, now = to_dict(from_dict(first["settings"])), to_dict(settings)
    for key in now.keys() - {"text"}:
        if then[key] != now[key]:
            raise ValueError(
                f"{folder} holds a search with {key} {then[key]}, not {now[key]}; give that or "
                "another folder"
            )
    if first["text"] != digest:
        raise ValueError(
            f"{folder} holds a search on another text than {settings.text}; give that text or "
            "another folder"
        )
