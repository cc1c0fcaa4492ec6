"""The page and the pictures of a result: gpu.md and *.png beside gpu.json."""

import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memshard.bench.gpu.bench import Bench, Result
from memshard.bench.gpu.outcome import RESULT, wrong
from memshard.experiments.common.curves import bars, lines

PAGE = "gpu.md"
_SHOWN = 12
"""Kernels of a profile on the page; gpu.json has more."""

Results = dict[str, dict[str, Any]]


def run(bench: Bench) -> Iterator[tuple[str, Result]]:
    """Write the page; yield the names of its files."""
    stages = json.loads((bench.out / RESULT).read_text(encoding="utf-8"))
    pictures = list(_pictures(stages["stages"], bench.out)) if find_spec("matplotlib") else []
    (bench.out / PAGE).write_text(page(stages, pictures), encoding="utf-8")
    yield "files", {"page": PAGE, "pictures": pictures}


def page(result: dict[str, Any], pictures: list[str]) -> str:
    """Return the page as Markdown."""
    stages = result["stages"]
    where = "a rehearsal on a CPU: no figure here is one of a GPU"
    if result["device"] == "cuda":
        device = stages.get("machine", {}).get("results", {}).get("device", {})
        where = device.get("name", "a GPU")
    text = [f"# {where}", "", *_verdict(result)]
    for name, stage in stages.items():
        if name != "page":
            text += ["", f"## {name}", "", *_stage(name, stage["results"])]
    text += ["", *(f"![{picture}]({picture})" for picture in pictures)]
    return "\n".join(text) + "\n"


def _verdict(result: dict[str, Any]) -> Iterator[str]:
    yield from _table(
        ("stage", "outcome", "s", "results"),
        (
            (name, stage["outcome"], f"{stage.get('seconds', 0):.1f}", len(stage["results"]))
            for name, stage in result["stages"].items()
        ),
    )
    yield ""
    problems = wrong(result)
    yield f"{len(problems)} are not as they should be:" if problems else "All as it should be."
    yield ""
    yield from (f"- {problem}" for problem in problems)


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _stage(name: str, results: Results) -> Iterator[str]:
    if name == "bandwidth":
        yield from _shares(results)
    elif name == "speed":
        yield from _speed(results)
    elif name == "headline":
        yield from _headline(results)
    else:
        yield from _table(("result", ""), ((what, _short(r)) for what, r in results.items()))


def _short(result: Result) -> str:
    """Return a result in a line."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        if isinstance(value, dict):
            return "; ".join(f"{key} {text(inner)}" for key, inner in value.items())
        if isinstance(value, list):
            return "; ".join(map(text, value))
        return str(value)

    shown = {key: value for key, value in result.items() if key != "ok"}
    mark = "**not as it should be** " if not result.get("ok", True) else ""
    return mark + ", ".join(
        text(value) if key == "skipped" else f"{key} {text(value)}" for key, value in shown.items()
    )


def _shares(results: Results) -> Iterator[str]:
    if "copy" in results:
        yield f"A copy moves {results['copy']['bytes_per_s'] / 1e9:,.0f} GB/s, read and written."
        yield ""
    rows = [
        (f"{name}: {what}", f"{line['ms']:.3f}", f"{line['share']:.0%}")
        for name, timed in results.items()
        if name.startswith("table of")
        for what, line in timed.items()
        if isinstance(line, dict)
    ]
    rows += [
        (name, f"{r['ms']:.3f}", f"{r['share']:.1%}, {r['flops'] / 1e12:.1f} TFLOP/s")
        for name, r in results.items()
        if "flops" in r
    ]
    yield from _table(("what", "ms", "of the copy"), rows)


def _speed(results: Results) -> Iterator[str]:
    models = {name: r for name, r in results.items() if "step_s" in r}
    yield from _table(
        ("model", "ms a step", "times", "tokens/s", "MFU", "planned GB", "taken GB"),
        (
            (
                name,
                f"{r['step_s'] * 1e3:.1f}",
                f"{r['times the step without']:.2f}",
                f"{r['tokens_per_s']:,.0f}",
                f"{r['mfu']:.1%}",
                f"{r['planned_bytes'] / 1e9:.2f}",
                f"{r['taken_bytes'] / 1e9:.2f}" if "taken_bytes" in r else "not counted on a CPU",
            )
            for name, r in models.items()
        ),
    )
    for name, r in results.items():
        if "kernels" in r:
            yield ""
            yield f"{name}: {r['launches']} launches, {r['busy_ms']:.1f} ms"
            yield ""
            kernels = list(r["kernels"].items())[:_SHOWN]
            yield from _table(
                ("kernel", "ms", "launches"),
                ((f"`{kernel}`", f"{x['ms']:.2f}", x["launches"]) for kernel, x in kernels),
            )


def _headline(results: Results) -> Iterator[str]:
    if "data" in results:
        yield _short(results["data"])
        yield ""
    yield from _table(
        ("model", "held-out loss", "perplexity", "s"),
        (
            (name, f"{r['held_out_loss']:.4f}", f"{r['perplexity']:.2f}", f"{r['seconds']:.1f}")
            for name, r in results.items()
            if "curve" in r
        ),
    )


def _pictures(stages: dict[str, Any], folder: Path) -> Iterator[str]:
    """Draw what there is; yield the files' names."""
    results: dict[str, Results] = {name: stage["results"] for name, stage in stages.items()}
    curves = {name: r["curve"] for name, r in results.get("headline", {}).items() if "curve" in r}
    # Of two points at least; a rehearsal may have fewer.
    if any(len(curve) > 1 for curve in curves.values()):
        for place, x in ((0, "tokens"), (1, "seconds")):
            measured = {
                name: {point[place]: [point[2]] for point in curve}
                for name, curve in curves.items()
            }
            lines(measured, {}, folder / f"loss_by_{x}.png", x, "loss, nats a token", "x")
            yield f"loss_by_{x}.png"
    shares = {
        f"{name}: {what}": (line["share"], 0.0)
        for name, timed in results.get("bandwidth", {}).items()
        if name.startswith("table of")
        for what, line in timed.items()
        if isinstance(line, dict)
    }
    if shares:
        bars(shares, folder / "shares.png", "share of a copy's bandwidth")
        yield "shares.png"
