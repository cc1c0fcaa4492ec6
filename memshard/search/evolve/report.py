"""The report of a search: whether the winner is better and by how much, where it comes from, and
what the hurdles saved.
"""

import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from memshard.search.dna.at_width import at_width
from memshard.search.dna.compile import Compiled, compile_dna
from memshard.search.dna.form import save
from memshard.search.evolve import pictures, power_law
from memshard.search.evolve.child import shape
from memshard.search.evolve.history import STOPPED, Child, History, saving, stops
from memshard.search.evolve.settings import to_dict
from memshard.search.evolve.verdict import SIGMAS, Curve, Interval, compare, noise, speed_up
from memshard.trainer.config.text import render

REPORT_FILE, RESULT_FILE, WINNER_FILE = "report.md", "result.json", "winner.json"
SOURCE_FILE, RECIPE_FILE = "winner.py", "winner.yaml"
WRITTEN = (REPORT_FILE, RESULT_FILE, WINNER_FILE, SOURCE_FILE, RECIPE_FILE)


def report(history: History, folder: Path) -> dict[str, Any]:
    """Write report, result, the winner's DNA and source, and pictures to `folder`, as far as the
    search has come; return the result.
    """
    settings = history.settings
    parts, result = (
        ["# Search\n"],
        {"settings": to_dict(settings), "children": len(history.searched())},
    )
    copies = [
        child.fitness for child in history.children[: settings.copies] if child.status == "full"
    ]
    # The copies are the start from different initial values: their spread is what
    # chance alone does.
    if len(copies) > 1:
        band = noise(copies)
        result["noise"] = band._asdict()
        parts.append(
            f"Start: `{settings.start}`, {history.children[0].parameters:,} parameters, "
            f"{settings.budget} steps. Its {band.runs} copies\n"
            f"end at {band.mean:.4f} nats a byte, give or take {band.deviation:.4f} (one standard "
            "deviation).\n"
        )
    pictures.history(history, folder / "search.png")
    parts.append("![all programs](search.png)\n")
    again = [child for child in history.children if child.phase in ("final", "lineage")]
    trained = {
        # A training for the verdict names as its parent the program that it trains again.
        id: runs
        for id in dict.fromkeys(child.parent for child in again)
        if id is not None and (runs := history.again(id))
    }
    # Only when all have ended: quick trainings would come first, and they are no fair sample.
    if 0 in trained and all(child.status for child in again):
        winner = history.winner()
        parts.append(_verdict(history, winner, trained, result))
        pictures.curves(
            {_name(history, id): [_curve(run) for run in runs] for id, runs in trained.items()},
            folder / "curves.png",
        )
        parts.append("![losses against cost](curves.png)\n")
        parts.append(_lineage(history, winner))
        parts.append(_power_law(history, winner, folder, result))
        parts.append(_source(history, winner, folder))
    parts.append(_rungs(history, result))
    parts.append(_ends(history, result))
    (folder / REPORT_FILE).write_text("\n".join(part for part in parts if part), encoding="utf-8")
    result = json.loads(
        json.dumps(result), parse_constant=lambda name: None
    )  # the deviation of one training is nan
    (folder / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _verdict(
    history: History, winner: int, trained: dict[int, list[Child]], result: dict[str, Any]
) -> str:
    """Return a table of everything trained again, and what follows for the winner."""
    start = trained[0]
    rows, result["again"] = [], {}
    for id, runs in sorted(
        trained.items(), key=lambda item: statistics.fmean(run.test for run in item[1])
    ):
        valid, test = noise([run.fitness for run in runs]), noise([run.test for run in runs])
        factor, in_flops = (
            # Against itself the start would get an interval too, from the draws, around 1.
            Interval(1.0, 1.0, 1.0)
            if id == 0
            else speed_up(
                [_curve(run, flops) for run in start], [_curve(run, flops) for run in runs]
            )
            for flops in (False, True)
        )
        child = history.children[id]
        result["again"][str(id)] = {
            "hash": child.hash,
            "parameters": child.parameters,
            "valid": valid._asdict(),
            "test": test._asdict(),
            "speed_up": factor._asdict(),
            "speed_up_flops": in_flops._asdict(),
            "search_loss": child.fitness,
            "phase": runs[0].phase,
        }
        rows.append(
            f"| {_name(history, id)} | {child.parameters:,} | "
            f"{round(statistics.fmean(run.steps for run in runs))} | {child.fitness:.4f} "
            f"| {valid.mean:.4f} | {test.mean:.4f} +- {test.deviation:.4f} ({test.runs}) | "
            f"{_interval(factor)} | {_interval(in_flops)} |"
        )
    head = (
        "| program | parameters | steps | in the search | search's text, again | verdict's text "
        "(seeds) | speed-up | speed-up in FLOPs |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    text = "## Verdict\n\n" + _against(history, winner, 0, trained, result, "start")
    path = history.lineage(winner)
    if len(path) > 1:
        # By hash: the parent may have been trained again under the number of a program equal to it.
        nearest = next((id for id in trained if history.children[id].hash == path[-2].hash), None)
        if nearest is not None and nearest != 0:
            text += _against(history, winner, nearest, trained, result, "parent")
    return (
        text + "\nTrained again from fresh initial values, on the training text in another order. "
        "The winner is chosen by the search's\n"
        "held-out text; the verdict's text serves nothing else. Losses in nats a byte, +- the "
        "deviation of one training. Speed-up:\n"
        "cost of the start over cost to reach the start's final loss, 95 % interval over "
        "seeds.\n\n" + head + "\n".join(rows) + "\n"
    )


def _against(
    history: History,
    winner: int,
    other: int,
    trained: dict[int, list[Child]],
    result: dict[str, Any],
    name: str,
) -> str:
    if winner == other:
        result["beats_start"] = False
        return "No program is better than the start.\n"
    runs = [[run.test for run in trained[id]] for id in (other, winner)]
    # One training has no deviation, and without it nothing is shown.
    if min(map(len, runs)) < 2:
        return ""
    outcome = compare(runs[0], runs[1])
    result[f"beats_{name}"], result[f"gain_over_{name}"] = (
        outcome.beats,
        {"nats": outcome.gain, "deviation": outcome.deviation},
    )
    verb = "beats" if outcome.beats else "does not beat"
    return (
        f"{_name(history, winner)} **{verb}** {_name(history, other)}: {outcome.gain:+.4f} nats a "
        "byte on text that the search never saw, "
        f"{outcome.gain / outcome.deviation:.1f} deviations of a training ({SIGMAS:g} are the "
        "noise band).\n"
    )


def _lineage(history: History, winner: int) -> str:
    rows = []
    # By hash again: children that compute the same share their trainings.
    again = {
        c.id: history.children[c.parent].hash
        for c in history.children
        if c.phase in ("final", "lineage") and c.parent is not None
    }
    for child in history.lineage(winner):
        runs = [
            history.children[id]
            for id, known in again.items()
            if known == child.hash and history.children[id].status == "full"
        ]
        mean = f"{statistics.fmean(run.test for run in runs):.4f}" if runs else ""
        rows.append(
            f"| {child.id} | {child.mutation or 'start'} | {child.parameters:,} | "
            f"{child.fitness:.4f} | {mean} |"
        )
    head = (
        "| program | mutation | parameters | loss in the search | verdict's text "
        "|\n|---|---|---|---|---|\n"
    )
    return "## Lineage of the winner\n\n" + head + "\n".join(rows) + "\n"


def _power_law(history: History, winner: int, folder: Path, result: dict[str, Any]) -> str:
    """Return the frontiers of start and winner, if they were trained at several sizes."""
    sides: list[dict[float, list[Curve]]] = []
    for program in (0, winner):
        runs = [
            c
            for c in history.children
            if c.parent == program and c.status == "full" and c.phase in ("final", "size")
        ]
        sides.append(
            {
                size: [_curve(run) for run in runs if run.size == size]
                for size in sorted({run.size for run in runs})
            }
        )
    # Nothing to compare the start with, or at a single size, through which no exponent goes.
    if winner == 0 or not history.settings.sizes:
        return ""
    # Frontiers of different sizes would compare the sizes.
    if len(sides[0]) < 2 or sides[0].keys() != sides[1].keys():
        failed = [c for c in history.children if c.phase == "size" and c.status not in ("", "full")]
        ends = "; ".join(
            f"{_name(history, c.parent or 0)} at {c.size:g} times the size, {c.status} ({c.reason})"
            for c in failed
        )
        return (
            f"## Power law\n\nNone, of trainings that did not come to their end: {ends}.\n"
            if failed
            else ""
        )
    try:
        law = power_law.compare(sides[0], sides[1])
    except ValueError as problem:
        return f"## Power law\n\nNone: {problem}.\n"
    pictures.frontiers(
        {_name(history, 0): (sides[0], law.first), _name(history, winner): (sides[1], law.second)},
        folder / "frontier.png",
    )
    result["power_law"] = {key: value._asdict() for key, value in law._asdict().items()}
    # An end that is None was not reached, so nothing is known on that side.
    equal = (
        law.difference.low is not None
        and law.difference.high is not None
        and law.difference.low <= 0 <= law.difference.high
    )
    return (
        f"## Power law\n\nStart and winner at {', '.join(f'{size:g}' for size in sides[0])} times "
        "the parameters and budget; loss = a\n"
        f"cost^-k along the lower hull. Exponents: start {_interval(law.k_first, 4)}, winner "
        f"{_interval(law.k_second, 4)}, difference\n"
        f"{_interval(law.difference, 4)}: "
        f"{'equal as far as these trainings tell' if equal else 'not equal'}. With one exponent "
        "for both,\n"
        "the winner needs 1/b of the start's cost for the same loss, b = "
        f"{_interval(law.factor)}: it saves 1 - 1/b of any cost, and the\n"
        f"saving follows the same power law.\n\n"
        "![frontiers](frontier.png)\n"
    )


def _rungs(history: History, result: dict[str, Any]) -> str:
    """Return what happened at each stop, among programs that met all hurdles."""
    settings = history.settings
    met = [
        c
        for c in history.searched()
        # The first programs meet no hurdles, since those are set by the losses of others, and would
        # raise the shares that pass.
        if c.status in ("full", STOPPED) and None not in c.hurdles and c.id >= settings.copies
    ]
    if not met or not settings.hurdles:
        return ""
    rows = []
    for stop, share in enumerate(stops(settings)):
        arrived = [c for c in met if len(c.rungs) > stop]
        # Whoever passes a stop is measured at the next one.
        passed = [c for c in met if len(c.rungs) > stop + 1]
        hurdle = (
            next((c.hurdles[stop] for c in reversed(met)), None)
            if stop < settings.hurdles
            else None
        )
        ratio = f"{len(passed) / len(arrived):.0%}" if arrived and stop < settings.hurdles else ""
        losses = [c.rungs[stop].loss for c in arrived] or [math.nan]
        rows.append(
            f"| {stop if stop < settings.hurdles else 'end'} | {share:.3f} | {len(arrived)} | "
            f"{len(passed) if ratio else ''} | {ratio} "
            f"| {'' if hurdle is None else f'{hurdle:.4f}'} | {min(losses):.4f} | "
            f"{statistics.median(losses):.4f} |"
        )
    # Settings.budget is in steps of the start, and so is what a program has spent, whatever its
    # step costs.
    factor, theory = (
        settings.budget / statistics.fmean(c.spent for c in met),
        saving(settings.hurdles),
    )
    result["saving"] = {"measured": factor, "theory": theory, "programs": len(met)}
    head = (
        "| hurdle | at | came | passed | share | last hurdle | lowest loss | median "
        "|\n|---|---|---|---|---|---|---|---|\n"
    )
    return (
        f"## Hurdles\n\nThe {len(met)} programs that met all hurdles took 1/{factor:.2f} of a "
        "whole training in the mean; if half pass\n"
        f"each hurdle that is 1/{theory:.2f} ({factor / theory - 1:+.0%}).\n\n{head}"
        + "\n".join(rows)
        + "\n"
    )


def _ends(history: History, result: dict[str, Any]) -> str:
    """Return how children ended, mutation by mutation."""
    born = [c for c in history.searched() if c.id >= history.settings.copies and c.status]
    if not born:
        return ""
    ends = Counter(child.status for child in born)
    result["ends"] = dict(ends.most_common())
    result["lost_workers"] = sum(child.lost for child in history.children)
    result["seconds"] = round(
        sum(child.rungs[-1].seconds for child in history.children if child.rungs)
    )
    order = [status for status, _ in ends.most_common()]
    rows = []
    for mutation, count in Counter(child.mutation for child in born).most_common():
        mutants = [child for child in born if child.mutation == mutation]
        cells = Counter(child.status for child in mutants)
        better = sum(
            c.status == "full" and c.fitness < history.children[c.parent or 0].fitness
            for c in mutants
        )
        rows.append(
            f"| {mutation or '-'} | {count} | "
            f"{' | '.join(str(cells[status] or '') for status in order)} | {better or ''} |"
        )
    head = (
        f"| mutation | born | {' | '.join(order)} | lower loss than the parent's "
        f"|\n|{'---|' * (len(order) + 3)}\n"
    )
    return (
        f"## Ends\n\n{len(born)} programs bred, {result['seconds']:,} seconds of processor in "
        "training, "
        f"{result['lost_workers']} workers lost.\n\n" + head + "\n".join(rows) + "\n"
    )


def _source(history: History, winner: int, folder: Path) -> str:
    child = history.children[winner]
    assert child.dna is not None
    save(child.dna, folder / WINNER_FILE)
    program = compile_dna(child.dna, shape(history.settings))
    if not isinstance(program, Compiled):
        return ""
    (folder / SOURCE_FILE).write_text(program.source, encoding="utf-8")
    model = program.config
    try:
        # From the file, as its reader will do it: this proves causality at full width, where the
        # search has checked a narrow program.
        uncached = at_width(folder / WINNER_FILE, model.dim).uncached
        proof = "generates with a cache" if uncached is None else f"cannot generate: {uncached}"
    except ValueError as problem:
        proof = f"**does not hold at full width**: {problem}"
    # Only what a recipe needs for this block; everything else is the reader's choice.
    keys = {
        "layers": model.layers,
        "dim": model.dim,
        "position": model.position,
        "program": model.program,
    }
    (folder / RECIPE_FILE).write_text(render({"model": keys}), encoding="utf-8")
    head = (
        f"## The winner's block\n\n`{WINNER_FILE}` is its DNA, `{SOURCE_FILE}` this source, "
        f"`{RECIPE_FILE}` a recipe's model.\n"
    )
    return f"{head}It {proof}.\n\n```python\n{program.source.strip()}\n```\n"


def _curve(run: Child, flops: bool = False) -> Curve:
    # A step costs more or less than one of the start's: losses are compared at equal cost, not at
    # equal steps.
    return [(rung.step * (run.flops if flops else run.cost), rung.loss) for rung in run.rungs]


def _name(history: History, id: int) -> str:
    return f"{history.settings.start} (start)" if id == 0 else f"program {id}"


def _interval(interval: Interval, digits: int = 2) -> str:
    value, low, high = ("not reached" if x is None else f"{x:.{digits}f}" for x in interval)
    return value if (low, high) == (value, value) else f"{value} [{low}, {high}]"
