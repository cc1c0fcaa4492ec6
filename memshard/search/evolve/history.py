"""The history of a search: a pure function of its journal, which also says what comes next."""

import hashlib
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from memshard.search.evolve.journal import Event
from memshard.search.evolve.settings import Settings

Phase = Literal["search", "final", "lineage", "size"]
STOPPED = "hurdle"
LOSSES = 3  # workers that a child may lose before it is to blame


class Rung(NamedTuple):
    """A measurement at a stop: after `step` steps, the held-out loss in nats a token and the
    seconds since the child's start.
    """

    step: int
    loss: float
    seconds: float


@dataclass
class Child:
    """One program from its birth on.

    phase: search; or another training of child `parent`'s program: final and lineage (for the
    verdict), size (for the power law). size: multiple of parameters and budget. hurdles: loss to
    reach at each stop, None where all pass. status: full, hurdle, dup, or why it was rejected;
    empty while it lives. lost, silent: number of its workers that died or hung, and of those that
    hung. fitness: held-out loss where it ended, infinite if it was rejected.
    """

    id: int
    phase: Phase
    parent: int | None
    size: float
    seed: int
    hurdles: list[float | None]
    dna: dict[str, Any] | None = None
    mutation: str = ""
    hash: str = ""
    parameters: int = 0
    steps: int = 0
    cost: float = 1.0
    flops: float = 0.0
    rungs: list[Rung] = field(default_factory=list)
    lost: int = 0
    silent: int = 0
    status: str = ""
    reason: str = ""
    fitness: float = math.inf
    test: float = math.nan

    @property
    def spent(self) -> float:
        """The cost of its training so far, in steps of the start program."""
        return self.rungs[-1].step * self.cost if self.rungs else 0.0


class History:
    """All children, and the rules that follow from them: who is a parent, what the hurdles are,
    what is born next.

    text: digest of the text that they train on.
    """

    def __init__(self, settings: Settings, text: str | None = None) -> None:
        self.settings = settings
        self.text = text
        self.children: list[Child] = []
        self.ended: list[int] = []

    def apply(self, event: Event) -> None:
        """Apply one event of the journal."""
        kind = event["event"]
        if kind == "born":
            self.children.append(
                Child(**{key: value for key, value in event.items() if key != "event"})
            )
            return
        if kind not in ("program", "steps", "rung", "lost", "done"):
            return
        child = self.children[event["id"]]
        if kind == "rung":
            # A child whose worker was lost starts again: a rung measured twice replaces what
            # followed the first.
            child.rungs[event["rung"] :] = [Rung(event["step"], event["loss"], event["seconds"])]
        elif kind == "lost":
            child.lost += 1
            child.silent += event.get("silent", False)
        else:
            for key in event.keys() - {"event", "id"}:
                setattr(child, key, event[key])
            if kind == "done":
                self.ended.append(child.id)
                if child.status in ("full", STOPPED):
                    child.fitness = child.rungs[-1].loss
                elif child.status == "dup":
                    twin = self.twin(child)
                    child.fitness = twin.fitness if twin else math.inf

    def living(self) -> list[Child]:
        """Return the children that are born and not done."""
        return [child for child in self.children if not child.status]

    def searched(self) -> list[Child]:
        """Return the children of the search itself, without trainings for the verdict."""
        return [child for child in self.children if child.phase == "search"]

    def visible(self, id: int) -> list[Child]:
        """Return the children that child `id` can be bred from.

        In a deterministic search those born at least `ahead` before it, in order of birth;
        otherwise those that have ended, in that order.
        """
        if self.settings.deterministic:
            # Whether the last `ahead` children have ended depends on the workers' speed, so none of
            # them is a parent.
            return self.children[: max(1, id - self.settings.ahead + 1)]
        # In order of ending, so that a fast worker is not held back by a slow one.
        before = [ended for ended in self.ended if ended < id]
        return [self.children[ended] for ended in before]

    def twin(self, child: Child) -> Child | None:
        """Return an earlier child of the same canonical program that trained, if any."""
        earlier = (
            self.visible(child.id)
            if child.phase == "search" and child.id >= self.settings.copies
            else []
        )
        return next(
            (
                other
                for other in reversed(earlier)
                if other.hash == child.hash and other.status in ("full", STOPPED)
            ),
            None,
        )

    def next_births(self) -> list[Event]:
        """Return the births that are possible now: one child of the search, or the missing
        trainings of a phase after it.
        """
        number = len(self.children)
        if number < self.settings.children:
            return self._breed(number)
        if self.living():
            return []
        for phase, programs, sizes, seeds in self._phases():
            jobs = [(id, size) for size in sizes for id in programs for _ in range(seeds)]
            if missing := jobs[sum(child.phase == phase for child in self.children) :]:
                return [
                    self._birth(number + n, phase, id, size, [])
                    for n, (id, size) in enumerate(missing)
                ]
        return []

    def _phases(self) -> Iterator[tuple[Phase, list[int], tuple[float, ...], int]]:
        """Yield phase, programs, sizes and seeds of what follows the search.

        Each phase is a function of those before it, so a kill loses none.
        """
        settings = self.settings
        yield (
            "final",
            [0, *(child.id for child in self.best(settings.finalists))],
            (1.0,),
            settings.final_seeds,
        )
        yield "lineage", self._ancestors(), (1.0,), settings.final_seeds
        yield "size", sorted({0, self.winner()}), settings.sizes, settings.size_seeds

    def best(self, count: int) -> list[Child]:
        """Return distinct programs of the search that trained to the end, the lowest losses first,
        without the start.
        """
        by_hash: dict[str, Child] = {}
        for child in sorted(self.searched(), key=lambda child: (child.fitness, child.id)):
            if child.status == "full" and child.hash != self.children[0].hash:
                by_hash.setdefault(child.hash, child)
        return list(by_hash.values())[:count]

    def again(self, id: int) -> list[Child]:
        """Return the completed trainings of child `id`'s program from fresh initial values, at its
        own size.
        """
        return [
            c
            for c in self.children
            if c.phase in ("final", "lineage") and c.parent == id and c.status == "full"
        ]

    def winner(self) -> int:
        """Return the id of the finalist with the lowest mean loss on the text of the search; 0, the
        start, if none is better.
        """
        means = {}
        for id in dict.fromkeys(c.parent for c in self.children if c.phase == "final"):
            assert id is not None
            runs = self.again(id)
            means[id] = (
                statistics.fmean(run.fitness for run in runs)
                if len(runs) == self.settings.final_seeds
                else math.inf
            )
        return min(means, key=lambda id: means[id], default=0)

    def lineage(self, id: int) -> list[Child]:
        """Return the path from the start to child `id`, without steps that changed nothing."""
        path: list[Child] = []
        at: int | None = id
        while at is not None:
            child = self.children[at]
            if not path or path[-1].hash != child.hash:
                path.append(child)
            else:
                path[-1] = child
            at = child.parent
        return path[::-1]

    def _ancestors(self) -> list[int]:
        """Return the winner's nearest ancestors that are not finalists."""
        known = {
            self.children[c.parent].hash
            for c in self.children
            if c.phase == "final" and c.parent is not None
        }
        path = [child.id for child in self.lineage(self.winner())[:-1] if child.hash not in known]
        return path[len(path) - min(len(path), self.settings.ancestors) :]

    def _breed(self, number: int) -> list[Event]:
        settings = self.settings
        if number < settings.copies:
            return [self._birth(number, "search", None, 1.0, [None] * settings.hurdles)]
        visible = self.visible(number)
        # Deterministic searches wait here for a straggler; `ahead` children are in work meanwhile.
        if not visible or any(not child.status for child in visible):
            return []
        # A generator for each child: a search that goes on draws what it would have drawn.
        draws = random.Random(f"{settings.seed}/{number}/tournament")
        population = visible[-settings.population :]
        parent = 0
        for _ in range(100):
            chosen = draws.sample(population, min(settings.tournament, len(population)))
            # The id breaks ties, so that a resumed search chooses alike.
            best = min(chosen, key=lambda child: (child.fitness, child.id), default=None)
            # A tournament of rejected programs only is drawn again; after 100 of them the start is
            # the parent.
            if best is not None and best.fitness < math.inf:
                parent = best.id
                break
        hurdles = [self._hurdle(visible, stop) for stop in range(settings.hurdles)]
        return [self._birth(number, "search", parent, 1.0, hurdles)]

    def _hurdle(self, visible: list[Child], stop: int) -> float | None:
        """Return the loss to reach at a stop so that half of the programs pass.

        It is a quantile of the latest losses there: the median, or stricter the more have passed so
        far. The median alone lets 70 to 90 % pass while the population improves fast, and 30 %
        while it does not.
        """
        window = self.settings.window
        arrived = [
            child for child in visible if child.phase == "search" and len(child.rungs) > stop
        ]
        if not arrived or len(arrived) < self.settings.free:
            return None
        met = [child for child in arrived if child.hurdles[stop] is not None]
        passed = sum(len(child.rungs) > stop + 1 for child in met)
        # A controller: each program too many that passed lowers the quantile by 1 / window.
        share = 0.5 - (passed - len(met) / 2) / window
        return float(
            np.quantile(
                [child.rungs[stop].loss for child in arrived[-window:]], min(max(share, 0.0), 1.0)
            )
        )

    def _birth(
        self, id: int, phase: Phase, parent: int | None, size: float, hurdles: list[float | None]
    ) -> Event:
        seed = (
            # Shifted to 31 bits, a seed that every generator takes.
            int.from_bytes(
                hashlib.sha256(f"{self.settings.seed}/{id}".encode()).digest()[:4], "big"
            )
            >> 1
        )
        return {
            "event": "born",
            "id": id,
            "phase": phase,
            "parent": parent,
            "size": size,
            "seed": seed,
            "hurdles": hurdles,
        }


def stops(settings: Settings) -> list[float]:
    """Return where programs are measured in the search, as shares of their steps: hurdle i of N at
    (2^(i+1) - 1) / (2^(N+1) - 1), and the end.

    Half of the programs pass each hurdle and the stretches double, so every stretch costs the same
    (So et al. 2021, section 3).
    """
    whole = 2 ** (settings.hurdles + 1) - 1
    return [(2 ** (stop + 1) - 1) / whole for stop in range(settings.hurdles + 1)]


def saving(hurdles: int) -> float:
    """Return by what factor N hurdles make the mean training cheaper if half pass each:
    (2^(N+1) - 1) / (N + 1).
    """
    return (2 ** (hurdles + 1) - 1) / (hurdles + 1)
