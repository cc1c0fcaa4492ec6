"""The order of training sequences: how much orders differ, and why (data.order)."""

import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

from memshard.data_pipeline.stream.train_stream import ORDERS
from memshard.experiments.common.catalogue import Experiment, Point, Scale
from memshard.experiments.common.repeated import mean_deviation
from memshard.experiments.data.arrangements import ARRANGEMENTS, BURST, BURSTS, PERMUTED
from memshard.experiments.data.runs import run_point
from memshard.trainer.evaluation.canvas import COLORS, canvas, clean

Rows = list[tuple[Point, dict[str, Any]]]

_STDLIB = "$(python -c 'import sysconfig; print(sysconfig.get_path(\"stdlib\"))') --suffix .py"
TEXTS = {
    "long": ("data/quickstart", f"{_STDLIB} --vocab 4096"),
    "short": ("data/pkm", "TEXT --vocab 4096 --held-out 0.005"),
}
"""Documents of some 5,000 and 500 tokens: data folder, and the arguments that build it."""
_CONTIGUOUS, _SHUFFLED, _BEST_FIT = ORDERS
_RATES = (1e-3, 3e-3, 1e-2)
_RATE = 3e-3
_HIGHEST = {"long": 1e-2, "short": 3e-3}
"""Of the rates tried in all settings: the next is 0.4 nats worse on short documents."""
_STEPS = 300
_CUT = 150  # steps an epoch of the cut text: the run goes through it twice
_SIZE = (
    "data.length=64",
    "train.batch=32",
    "model.layers=2",
    "model.dim=128",
    "optimizer.schedule=constant",
    "train.eval_tokens=20480",
    "train.log_every=10",
    "train.precision=bf16",
)
_NO_MEMORY = ("model.memory.layers=[]",)
_MEMORY = (
    "model.memory.layers=[1]",
    "model.memory.keys=64",
    "model.memory.heads=2",
    "model.memory.key_dim=64",
)


def _point(
    text: str,
    arrangement: str,
    lr: float = _RATE,
    seed: int = 0,
    memory: bool = False,
    cut: int | None = None,
) -> Point:
    path, build = TEXTS[text]
    order = arrangement if arrangement in ORDERS else _CONTIGUOUS
    return {
        "text": text,
        "arrangement": arrangement,
        "lr": lr,
        "seed": seed,
        "memory": memory,
        "cut": cut,
        "recipe": "quickstart",
        "overrides": [
            f"data.path={path}",
            f"data.order={order}",
            *_SIZE,
            *(_MEMORY if memory else _NO_MEMORY),
            f"train.steps={_STEPS}",
            "train.eval_every=50",
            "train.save_every=100",
            f"train.seed={seed}",
            f"optimizer.lr={lr}",
            # A row is read some hundred times: docs/memory.md.
            f"tables.lr={10 * lr}",
        ],
        "build": build,
    }


def _tuned(text: str, memory: bool) -> float:
    """Return the rate of all seeds but 0: of seed 0 the best in nearly every order and length."""
    return 1e-3 if text == "short" and not memory else _RATE


def _probe(text: str, cut: int | None) -> Point:
    point = _point(text, _CONTIGUOUS, cut=cut)
    return {"probe": "streams", **{key: point[key] for key in ("text", "cut", "recipe")}} | {
        "overrides": point["overrides"]
    }


def _points(scale: Scale) -> list[Point]:
    """Return the points, the most telling first; those of full begin with those of small."""
    if scale == "smoke":
        points = [_probe("long", None), *(_point("long", name) for name in ARRANGEMENTS)]
        return [_tiny(point) for point in [*points, _point("long", _SHUFFLED, cut=4)]]
    texts, pair = tuple(TEXTS), (_CONTIGUOUS, _SHUFFLED)
    other_rates = [rate for rate in _RATES if rate != _RATE]
    points = [_probe(text, cut) for cut in (None, _CUT) for text in texts]
    points += [_point(*of) for of in product(texts, pair)]
    points += [_point(text, PERMUTED) for text in texts]
    points += [_point(text, name, lr) for lr in other_rates for text in texts for name in pair]
    points += [_point(*of, cut=_CUT) for of in product(texts, pair)]
    points += [_point(text, _BEST_FIT) for text in texts]
    points += [_point(text, BURSTS) for text in texts]
    points += [_point(*of, seed=seed) for seed in (1, 2) for of in product(texts, pair)]
    points += [_point(*of, memory=True) for of in product(texts, pair)]
    if scale == "full":
        settings = list(product((False, True), (None, _CUT), texts, ORDERS))
        points += [
            _point(text, name, lr, 0, memory, cut)
            for memory, cut, text, name in settings
            for lr in _RATES
            if lr <= _HIGHEST[text]
        ]
        points += [
            _point(text, name, _tuned(text, memory), seed, memory, cut)
            for seed in (1, 2)
            for memory, cut, text, name in settings
        ]
        points += [
            _point(text, name, seed=seed)
            for seed, text, name in product((1, 2), texts, (PERMUTED, BURSTS))
        ]
    return list({json.dumps(point): point for point in points}.values())


def _tiny(point: Point) -> Point:
    sizes = ("data.path=data/smoke", "data.length=32", "train.batch=4", "model.dim=32")
    steps = ("train.steps=12", "train.eval_every=6", "train.eval_tokens=2048")
    return {**point, "overrides": [*point["overrides"], *sizes, *steps]}


def _report(rows: Rows, folder: Path) -> str:
    runs = [(point, result) for point, result in rows if "probe" not in point]
    text = (
        f"Two layers of width 128, {_STEPS} steps of 32 x 64 tokens at a constant rate after "
        f'warm-up; nats a held-out token. Text "long": the Python standard library, "short": '
        f'English Wikipedia; "cut": a part of it that {_CUT} steps go through, twice a run. '
        "Mean +- standard deviation where there are several seeds; bold: the best rate of those "
        "with the most seeds.\n\n"
    )
    text += _losses(runs) + _differences(runs) + _causes(rows)
    _draw(runs, folder / "order.png")
    return text + "\n![held-out loss by step](order.png)\n"


def _setting(point: Point) -> str:
    """Return what two runs that are compared must share: text, cut, memory."""
    parts = [point["text"], "cut" if point["cut"] else "", "memory" if point["memory"] else ""]
    return ", ".join(part for part in parts if part)


def _by_rate(runs: Rows) -> dict[str, dict[str, dict[float, dict[int, dict[str, Any]]]]]:
    """Return results by setting, arrangement, rate and seed."""
    table: dict[str, dict[str, dict[float, dict[int, dict[str, Any]]]]] = {}
    for point, result in runs:
        of_setting = table.setdefault(_setting(point), {})
        of_rate = of_setting.setdefault(point["arrangement"], {}).setdefault(point["lr"], {})
        of_rate[point["seed"]] = result
    return table


def _mean(results: dict[int, dict[str, Any]]) -> float:
    return statistics.mean(result["loss"] for result in results.values())


def _best(rates: dict[float, dict[int, dict[str, Any]]]) -> float:
    """Return the rate with the lowest mean loss of those with the most seeds."""
    most = max(map(len, rates.values()))
    return min((rate for rate in rates if len(rates[rate]) == most), key=lambda r: _mean(rates[r]))


def _losses(runs: Rows) -> str:
    rates = sorted({point["lr"] for point, _ in runs})
    text = f"| text | arrangement | epochs | {' | '.join(f'rate {rate:g}' for rate in rates)} |\n"
    text += f"|---|---|---|{'---|' * len(rates)}\n"
    for setting, arrangements in _by_rate(runs).items():
        for arrangement, by_rate in arrangements.items():
            best = _best(by_rate)
            cells = []
            for rate in rates:
                losses = [result["loss"] for result in by_rate.get(rate, {}).values()]
                cell = mean_deviation(losses, ".3f") if losses else ""
                cells.append(f"**{cell}**" if rate == best else cell)
            epochs = next(iter(by_rate[best].values()))["epochs"]
            text += f"| {setting} | {arrangement} | {epochs:.2f} | {' | '.join(cells)} |\n"
    return text


def _differences(runs: Rows) -> str:
    """Return a table of what each arrangement gains over contiguous, each at its best rate."""
    text = (
        "\nGain over contiguous in held-out loss, seed by seed, each at its best rate, along the "
        "run.\n\n| text | arrangement | rates | "
    )
    curves = [step for step, _ in runs[0][1]["curve"]]
    places = range(len(curves))[1::2]
    text += f"{' | '.join(f'step {curves[place]}' for place in places)} | training |\n"
    text += f"|---|---|---|{'---|' * len(places)}---|\n"
    for setting, arrangements in _by_rate(runs).items():
        if _CONTIGUOUS not in arrangements:
            continue
        base_rate = _best(arrangements[_CONTIGUOUS])
        base = arrangements[_CONTIGUOUS][base_rate]
        for arrangement, by_rate in arrangements.items():
            rate = _best(by_rate)
            seeds = sorted(set(base) & set(by_rate[rate]))
            if arrangement == _CONTIGUOUS or not seeds:
                continue
            pairs = [(base[seed], by_rate[rate][seed]) for seed in seeds]
            cells = [
                mean_deviation([a["curve"][at][1] - b["curve"][at][1] for a, b in pairs], "+.3f")
                for at in places
            ]
            cells.append(mean_deviation([a["training"] - b["training"] for a, b in pairs], "+.3f"))
            text += (
                f"| {setting} | {arrangement} | {base_rate:g}, {rate:g} | {' | '.join(cells)} |\n"
            )
    return text


def _causes(rows: Rows) -> str:
    text = (
        "\nWhat steps have in common: documents met, of all; rare tokens (less than one in two "
        "steps) that were in the step before, and ten before. Adam's last update over the rate, "
        f"|m| / sqrt(v), in embedding rows of rare and of other tokens, at rate {_RATE:g}. Bursts: "
        f"lanes jump every {BURST} steps; permuted: the same sequences as contiguous, over the "
        "steps of the run.\n\n| text | arrangement | documents | rare again, 1 step | 10 steps | "
        "update, rare | others |\n|---|---|---|---|---|---|---|\n"
    )
    for point, result in rows:
        if "probe" not in point:
            continue
        for arrangement, facts in result["arrangements"].items():
            runs = [
                run
                for other, run in rows
                if "probe" not in other
                and (other["text"], other["cut"]) == (point["text"], point["cut"])
                and (other["arrangement"], other["lr"]) == (arrangement, _RATE)
                and not other["memory"]
            ]
            updates = [
                f"{statistics.mean(run[key] for run in runs):.3f}" if runs else ""
                for key in ("update_rare", "update_frequent")
            ]
            again = [
                "" if facts[key] is None else f"{100 * facts[key]:.1f} %"
                for key in ("again_1", "again_10")
            ]
            cut = ", cut" if point["cut"] else ""
            text += (
                f"| {point['text']}{cut} | {arrangement} | {facts['documents']:,} of "
                f"{result['documents']:,} | {' | '.join([*again, *updates])} |\n"
            )
    return text


def _draw(runs: Rows, file: Path) -> None:
    table = _by_rate(runs)
    figure = canvas(8, 3.2 * -(-len(table) // 2))
    panels = figure.subplots(-(-len(table) // 2), 2, squeeze=False).ravel()
    for axes in panels[len(table) :]:
        axes.set_visible(False)
    for axes, (setting, arrangements) in zip(panels, table.items(), strict=False):
        clean(axes)
        for arrangement, by_rate in arrangements.items():
            results = list(by_rate[_best(by_rate)].values())
            steps = [step for step, _ in results[0]["curve"]]
            losses = [[result["curve"][at][1] for result in results] for at in range(len(steps))]
            color = COLORS[ARRANGEMENTS.index(arrangement)]
            axes.plot(steps, list(map(statistics.mean, losses)), color=color, label=arrangement)
            low, high = (list(map(end, losses)) for end in (min, max))
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_title(setting, fontsize=9)
        axes.set_xlabel("steps")
        axes.set_ylabel("held-out loss, best rate")
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(file)


EXPERIMENT = Experiment(
    what="contiguous, shuffled and best-fit order of sequences, long and short documents, by rate; "
    "causes of the difference (needs data/quickstart and data/pkm, at scale smoke data/smoke)",
    points=_points,
    run=run_point,
    report=_report,
    hours={"smoke": 0.02, "small": 0.9, "full": 3.0},
)
