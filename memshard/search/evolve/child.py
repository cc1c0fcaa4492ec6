"""One child in a worker: proposed by mutating its parent, its step timed, then trained from stop to
stop. Reports progress as events.
"""

import hashlib
import json
import math
import random
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from memshard.search.dna.compile import Compiled, Rejected, Shape, compile_dna
from memshard.search.dna.golden import golden
from memshard.search.dna.mutate import mutate
from memshard.search.evolve.child_training import ChildTraining
from memshard.search.evolve.history import STOPPED, stops
from memshard.search.evolve.journal import Event
from memshard.search.evolve.settings import Settings, to_dict
from memshard.search.evolve.text import Text, read_text

MUTATIONS = ("delete", "insert", "replace", "field", "swap", "bank")  # in the order of the setting
FAILED = "failed"
FEWEST_STEPS = 5  # to the first stop; programs that make fewer are too slow to be judged
BEAT = 2.0  # seconds between signs of life
_text = cache(read_text)
CURVE = tuple(np.geomspace(0.05, 1, 13).tolist())


@dataclass(frozen=True)
class Task:
    """A worker's task for child `id`.

    do: "propose" finds its program by mutating its parent's, where dna and parent_hash are the
    parent's, None for the start; "train" trains the program `dna`. seed: seed of initial values.
    hurdles: loss to reach at each of the first stops; None lets all pass. verdict: whether this is
    a training outside the search, with other data, a curve, and the loss on the part of the text
    that the search never sees. steps, cost: what an earlier attempt measured; steps is 0 if there
    was none. size: multiple of parameters and budget. state: file with the training as it was at
    its last stop, so that another attempt goes on from there. text: digest of the search's text.
    """

    do: Literal["propose", "train"]
    id: int
    settings: Settings
    seed: int
    size: float = 1.0
    dna: dict[str, Any] | None = None
    parent_hash: str = ""
    hurdles: tuple[float | None, ...] = ()
    verdict: bool = False
    steps: int = 0
    cost: float = 1.0
    state: Path | None = None
    text: str | None = None


def work(task: Task) -> Iterator[Event]:
    """Do a task and yield its events; a training and a rejected program end with `done`.

    `failed` ends a task, and the search, that a full disk or a missing file stopped: the program is
    not to blame.
    """
    # One core a worker: times of steps then do not depend on how many workers there are.
    torch.set_num_threads(1)
    yield {"event": "beat", "id": task.id, "step": 0, "steps": 1}
    try:
        _check_text(task)
        for event in propose(task) if task.do == "propose" else train(task):
            yield {"event": event.pop("event"), "id": task.id, **event}
    except OSError as error:
        yield {"event": FAILED, "id": task.id, "reason": str(error)}
    except (MemoryError, torch.OutOfMemoryError) as error:
        yield _done(task, "oom", str(error) or "MemoryError")
    except Exception as error:
        # torch's CPU allocator raises a plain RuntimeError.
        status = "oom" if "can't allocate memory" in str(error) else "crash"
        yield _done(task, status, f"{type(error).__name__}: {error}"[:500])


def _check_text(task: Task) -> None:
    """Raise OSError if the search's text has been replaced since it began."""
    settings = task.settings
    if task.text is not None and _text(settings.text, settings.length).digest != task.text:
        raise OSError(f"{settings.text} is not the text any more that the search began with")


def shape(settings: Settings, size: float = 1.0) -> Shape:
    """Return the vocabulary, length and parameter band that programs are compiled for."""
    low, high = settings.parameters
    vocabulary = _text(settings.text, settings.length).vocabulary
    return Shape(
        vocab=vocabulary,
        length=settings.length,
        layers=settings.layers,
        parameters=(round(low * size), round(high * size)),
    )


@cache
def start_dna(settings: Settings) -> dict[str, Any]:
    """Return the start's DNA, with its attention scores scaled for the width of its heads."""
    program = compile_dna(golden(settings.start), shape(settings))
    if isinstance(program, Rejected):
        raise ValueError(f"the start, {settings.start}, does not compile: {program.reason}")
    return golden(settings.start, program.unit)


def propose(task: Task) -> Iterator[Event]:
    """Mutate the parent and compile the child."""
    target = shape(task.settings)
    # A function of seed and child: a child that is proposed again, after a kill, is the same.
    draws = random.Random(f"{task.settings.seed}/{task.id}/mutation")
    weights = dict(zip(MUTATIONS, task.settings.mutations, strict=True))
    dna, mutation = (
        mutate(task.dna, draws, weights) if task.dna is not None else (start_dna(task.settings), "")
    )
    program = compile_dna(dna, target)
    if isinstance(program, Rejected):
        yield {
            "event": "done",
            "dna": dna,
            "mutation": mutation,
            "status": program.status,
            "reason": program.reason,
        }
    elif program.hash == task.parent_hash:
        yield {
            "event": "done",
            "status": "same",
            "reason": "no mutation that was tried changed the program",
        }
    else:
        yield {
            "event": "program",
            "dna": dna,
            "mutation": mutation,
            "hash": program.hash,
            "parameters": program.parameters,
        }


def train(task: Task) -> Iterator[Event]:
    """Train from stop to stop until a hurdle is missed or the budget is spent."""
    settings = task.settings
    text = _text(settings.text, settings.length)
    program = _compiled(task.dna, settings, task.size)
    steps = task.steps
    if not steps:
        # Counted, not estimated: programs have operations for which no formula is known.
        operations = flops(program, settings, text)
        cost = 1.0
        if settings.step_costs == "flops":
            cost = operations / _start_flops(settings)
        elif settings.step_costs == "time" and not _is_start(program, settings):
            slowest = (
                math.inf
                if task.verdict
                else settings.budget * task.size * stops(settings)[0] / FEWEST_STEPS
            )
            cost = yield from _relative_time(program, settings, slowest)
        steps = max(1, round(settings.budget * task.size / cost))
        yield {"event": "steps", "steps": steps, "cost": round(cost, 4), "flops": operations}
    shares = list(CURVE) if task.verdict else stops(settings)
    if steps * shares[0] < FEWEST_STEPS and not task.verdict:
        yield {"event": "done", "status": "slow", "reason": f"{steps} steps fit into the budget"}
        return
    training = ChildTraining(
        program, settings, text, task.seed, task.seed if task.verdict else settings.seed
    )
    identity = _identity(task, program, text, steps)
    rungs = training.load(task.state, identity) if task.state is not None else []
    # Processor time goes on from where an earlier attempt stopped.
    begun, beat = _clock(settings) - (rungs[-1]["seconds"] if rungs else 0.0), time.monotonic()
    for number, share in enumerate(shares):
        if number == len(rungs):
            stop = max(1, round(share * steps))
            while training.step < stop:
                if not math.isfinite(training.advance()):
                    yield {
                        "event": "done",
                        "status": "nonfinite",
                        "reason": f"loss or gradient at step {training.step}",
                    }
                    return
                if time.monotonic() - beat > BEAT:
                    beat = time.monotonic()
                    yield {"event": "beat", "step": training.step, "steps": steps}
            loss = training.loss("valid")
            if not math.isfinite(loss):
                yield {
                    "event": "done",
                    "status": "nonfinite",
                    "reason": f"held-out loss after step {training.step}",
                }
                return
            rungs.append(
                {
                    "rung": number,
                    "step": stop,
                    "loss": loss,
                    "seconds": round(_clock(settings) - begun, 3),
                }
            )
            if task.state is not None:
                training.save(task.state, identity, rungs)
        yield {
            "event": "rung",
            **rungs[number],
        }  # also one that was loaded: the file may be ahead of the journal
        loss, hurdle = (
            rungs[number]["loss"],
            task.hurdles[number] if number < len(task.hurdles) else None,
        )
        if hurdle is not None and loss > hurdle:
            yield {
                "event": "done",
                "status": STOPPED,
                "reason": f"{loss:.4f} at hurdle {number}, {hurdle:.4f} to reach",
            }
            return
    yield {
        "event": "done",
        "status": "full",
        **({"test": training.loss("test")} if task.verdict else {}),
    }


def _identity(task: Task, program: Compiled, text: Text, steps: int) -> str:
    """Return a hash that says which training a state belongs to.

    A folder may have states of another search, or of steps that no journal knows.
    """
    settings = to_dict(replace(task.settings, text=text.digest))
    return hashlib.sha256(
        json.dumps([settings, program.hash, task.seed, task.size, task.verdict, steps]).encode()
    ).hexdigest()


def _compiled(dna: dict[str, Any] | None, settings: Settings, size: float) -> Compiled:
    assert dna is not None
    program = compile_dna(dna, shape(settings, size))
    if isinstance(program, Rejected):
        raise ValueError(f"the program does not compile at {size} times the size: {program.reason}")
    return program


@cache
def _start(settings: Settings) -> Compiled:
    return _compiled(start_dna(settings), settings, 1.0)


@cache
def _start_flops(settings: Settings) -> float:
    return flops(_start(settings), settings, _text(settings.text, settings.length))


def _is_start(program: Compiled, settings: Settings) -> bool:
    """Return whether this is the start at its own size, whose step costs 1 by definition."""
    start = _start(settings)
    return (program.hash, program.parameters) == (start.hash, start.parameters)


def flops(program: Compiled, settings: Settings, text: Text) -> float:
    """Return the floating-point operations of a step's matrix products, forward and backward."""
    aten = torch.ops.aten
    uncounted = {  # by torch 2.13: the fused attention of CPUs
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        ChildTraining(program, settings, text, 0, 0).advance()
    return float(counter.get_total_flops())


def _relative_time(
    program: Compiled, settings: Settings, slowest: float, rounds: int = 8
) -> Generator[Event, None, float]:
    """Return the time of a step over that of the start's, each the fastest of interleaved steps.

    Interleaved, so that other work on the machine slows both. Stops early above `slowest`.
    """
    text = _text(settings.text, settings.length)
    pair = [ChildTraining(start, settings, text, 0, 0) for start in (_start(settings), program)]
    fastest = [math.inf, math.inf]
    for turn in range(rounds):
        if fastest[1] > slowest * fastest[0]:
            break
        yield {"event": "beat", "step": 0, "steps": 1}
        for number, training in enumerate(pair):
            begun = _clock(settings)
            training.advance()
            if turn:  # the first one sets things up
                fastest[number] = min(fastest[number], _clock(settings) - begun)
    return fastest[1] / fastest[0]


def _clock(settings: Settings) -> float:
    """Return seconds of processor time, or of the GPU."""
    if settings.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _done(task: Task, status: str, reason: str) -> Event:
    return {"event": "done", "id": task.id, "status": status, "reason": reason}
