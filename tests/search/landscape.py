"""A search without training: programs are a number, and their loss is known. As a script it runs
one, for tests that kill it.
"""

import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from memshard.search.evolve.child import Task
from memshard.search.evolve.history import STOPPED, History, stops
from memshard.search.evolve.journal import Event
from memshard.search.evolve.run import search
from memshard.search.evolve.settings import Settings
from memshard.search.evolve.workers import Processes

PAUSE = 0.002


def settings(folder: Path, **changes: Any) -> Settings:
    """Return settings of a short search on a text that is written into the folder."""
    text = folder / "text"
    if not text.exists():
        text.write_bytes(bytes(range(97, 107)) * 1000)
    small = {
        "children": 60,
        "copies": 4,
        "population": 12,
        "tournament": 4,
        "free": 4,
        "window": 16,
        "budget": 150,
        "final_seeds": 2,
    }
    return Settings(str(text), **({"seed": 0} | small | changes))


def work(task: Task) -> Iterator[dict[str, Any]]:
    """Mutations move the number, mostly down; the loss falls with steps and number, plus noise of
    the seed. A tenth is rejected.
    """
    draw = random.Random(f"{task.seed}/{task.id}")
    time.sleep(PAUSE * draw.random())
    if task.do == "propose":
        number = 0.0 if task.dna is None else task.dna["number"] + draw.gauss(-1, 1)
        mutation = "" if task.dna is None else "move"
        if mutation and draw.random() < 0.1:
            yield {
                "event": "done",
                "id": task.id,
                "dna": {"number": number},
                "mutation": mutation,
                "status": "leak",
                "reason": "drawn",
            }
        else:
            known = {"hash": f"{number:.3f}", "parameters": 1}
            yield {
                "event": "program",
                "id": task.id,
                "dna": {"number": number},
                "mutation": mutation,
                **known,
            }
        return
    assert task.dna is not None
    if not task.steps:
        yield {"event": "steps", "id": task.id, "steps": 150, "cost": 1.0, "flops": 1.0}
    for rung, share in enumerate(stops(task.settings)):
        time.sleep(PAUSE * draw.random())
        loss = 3 - task.dna["number"] * 0.1 - share + draw.gauss(0, 0.02)
        yield {
            "event": "rung",
            "id": task.id,
            "rung": rung,
            "step": round(150 * share),
            "loss": loss,
            "seconds": 0.0,
        }
        hurdle = task.hurdles[rung] if rung < len(task.hurdles) else None
        if hurdle is not None and loss > hurdle:
            yield {"event": "done", "id": task.id, "status": STOPPED, "reason": "drawn"}
            return
    yield {"event": "done", "id": task.id, "status": "full", "test": loss}


def run(folder: Path, workers: int, **changes: Any) -> History:
    """Run the search with real worker processes."""
    chosen = settings(folder, **changes)
    return search(
        folder,
        chosen,
        lambda: Processes(work, workers, chosen.timeout, None),
        say=lambda line: None,
    )


class Here:
    """Workers without processes: a task runs when it is polled."""

    count = 1

    def __init__(self, work: Callable[[Task], Iterable[Event]]) -> None:
        self._waiting: deque[Task] = deque()
        self._work = work

    def submit(self, task: Task) -> None:
        self._waiting.append(task)

    def poll(self, seconds: float) -> list[Event]:
        return list(self._work(self._waiting.popleft()))

    def close(self) -> None: ...


def run_here(
    folder: Path,
    work: Callable[[Task], Iterable[Event]] = work,
    say: Callable[[str], None] = lambda line: None,
    **changes: Any,
) -> History:
    """Run the search without processes."""
    return search(folder, settings(folder, **changes), lambda: Here(work), say)


def outcome(history: History) -> list[Any]:
    """Return all that two equal histories must agree on: programs, losses, ends, and the winner."""
    facts = ("id", "parent", "dna", "mutation", "hash", "steps", "hurdles", "status", "fitness")
    children = [
        [getattr(child, fact) for fact in facts] + [rung[:2] for rung in child.rungs]
        for child in history.children
    ]
    return [children, history.winner()]


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), children=int(sys.argv[3]))
