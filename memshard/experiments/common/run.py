"""Run the points of an experiment in parallel processes, store each result, write the report."""

import hashlib
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from memshard.experiments.common import compact_json
from memshard.experiments.common.catalogue import Point, Scale, find
from memshard.experiments.common.training_runs import recipe_text
from memshard.io import named, read_json_lines
from memshard.lock import holding
from memshard.search.processes import end_with_parent

RESULTS_FILE, SUMMARY_FILE, REPORT_FILE = "points.jsonl", "result.json", "report.md"


def reproduce(
    name: str, scale: Scale, folder: Path, workers: int = 1, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run the missing points of an experiment, write result.json, report.md and pictures to
    `folder`, and return the summary, the content of result.json.

    Points that are in points.jsonl already are not run again, so an interrupted experiment goes on
    where it stopped; another scale only adds the points that it does not share. FolderHeld if
    another process works in the folder.
    """
    with holding(folder, "choose another folder with --out"):
        return _reproduce(name, scale, folder, workers, say)


def _reproduce(
    name: str, scale: Scale, folder: Path, workers: int, say: Callable[[str], None]
) -> dict[str, Any]:
    experiment = find(name)
    points = experiment.points(scale)
    done = _read(folder / RESULTS_FILE)
    missing = [point for point in points if _key(point) not in done]
    hours = experiment.hours[scale] * len(missing) / len(points)
    say(
        f"{name}, scale {scale}: {len(points)} points, {len(missing)} to run, about "
        f"{_duration(hours)} of processor time"
    )
    timed = [point for point in missing if experiment.alone(point)]
    others = [point for point in missing if point not in timed]
    # Timed points last and one at a time: other processes would slow them by an unknown amount.
    for point, result, seconds in chain(_results(name, others, workers), _results(name, timed, 1)):
        line = json.dumps(
            {"key": _key(point), "point": point, "result": result, "seconds": round(seconds, 2)}
        )
        # Read back from the line: tuples are lists and keys are text, as in points of
        # an earlier call.
        done[_key(point)] = json.loads(line)
        # A line as soon as a point is done: an interruption loses the points in work and no others.
        path = folder / RESULTS_FILE
        with named(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        say(f"{_text(point)}: {_text(result)} ({seconds:.0f} s)")
    rows = [done[_key(point)] for point in points]
    report = experiment.report([(row["point"], row["result"]) for row in rows], folder)
    (folder / REPORT_FILE).write_text(report, encoding="utf-8")
    summary = {
        "experiment": name,
        "scale": scale,
        "versions": _versions(),
        "seconds": sum(row["seconds"] for row in rows),
        "points": rows,
    }
    compact_json.write(summary, folder / SUMMARY_FILE)
    say(report)
    return summary


def _results(name: str, points: list[Point], workers: int) -> Iterator[Any]:
    """Yield (point, result, seconds) of every point as it is done."""
    # A forked process would inherit torch's thread pool in an undefined state.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    # At least one worker, since a pool refuses to have none, even for no points.
    with ProcessPoolExecutor(min(workers, max(1, len(points))), context, _prepare_worker) as pool:
        waiting: dict[Future[tuple[dict[str, Any], float]], Point] = {
            pool.submit(_run, name, point): point for point in points
        }
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    point = waiting.pop(future)
                    yield point, *future.result()
        except KeyboardInterrupt:
            # Else the points in work, which take up to hours, would be waited for.
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()
            raise
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a worker process was killed at one of {len(waiting) + 1} points that are not "
                "done: the machine may be out of memory; the same command goes on, with fewer "
                "--workers in less memory"
            ) from error
        finally:
            # Otherwise an error or Ctrl-C would wait for all points that have not begun, which may
            # be hours.
            pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    end_with_parent()


def _run(name: str, point: Point) -> tuple[dict[str, Any], float]:
    # Processor time, since other points run beside this one.
    begun = time.process_time()
    result = find(name).run(point)
    return result, time.process_time() - begun


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows that earlier calls wrote, by key.

    A last line that a kill cut short is removed from the file.
    """
    rows = {row["key"]: row for row in read_json_lines(path)}
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return rows


def _key(point: Point) -> str:
    """Return a hash of the point, of the recipes it names as they read now, and of their data."""
    # A recipe is named in a point; if its file or its data change, the result is another one.
    text = "".join(recipe_text(recipe) for recipe in _recipes(point))
    return hashlib.sha256((json.dumps(point, sort_keys=True) + text).encode()).hexdigest()


def _recipes(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every {recipe, overrides, ...} anywhere in a point."""
    if isinstance(value, dict):
        if "recipe" in value:
            yield value
        for inner in value.values():
            yield from _recipes(inner)


def _versions() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**9
    machine = {"cores": os.cpu_count(), "GB of memory": memory, "threads a point": 1}
    return {"torch": torch.__version__, "python": platform.python_version(), **machine}


def _text(values: dict[str, Any]) -> str:
    shown = {
        key: f"{value:.4g}" if isinstance(value, float) else value
        for key, value in values.items()
        if not isinstance(value, list | dict)
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(1, round(hours * 60))} minutes"
