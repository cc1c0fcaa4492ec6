"""Language models: the sum rule against the delta rule, with truncated and with endless contexts
(Schlag et al. 2021, tables 2 and 4).
"""

from pathlib import Path
from typing import Any

from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.experiments.common.catalogue import Experiment, Point, Scale
from memshard.experiments.common.curves import lines
from memshard.experiments.common.repeated import mean_deviation, seeds
from memshard.experiments.common.training_runs import run_folder, trained_run
from memshard.trainer.evaluation.perplexity import Evaluation, evaluate
from memshard.trainer.run import Run

RUNS = Path("runs/reproduce/fast_weights/language/runs")

_SUM = ["model.mixer.kind=linear"]
_CARRIED = ["train.carry_state=true", "model.position=none"]
# As published, the sum rule keeps its attention normalisation everywhere: without it an endless
# context is worse still (above 1,600).
_MODELS: dict[str, list[str]] = {
    "delta": [],
    "sum": _SUM,
    "delta, carried": _CARRIED,
    "sum, carried": [*_SUM, *_CARRIED],
    "softmax, with positions": ["model.mixer.kind=softmax", "model.position=sinusoidal"],
}
# Word perplexities of the test set, small and medium, read from tables 2 to 4: with truncated
# contexts, and without.
_PUBLISHED: dict[str, tuple[str, str]] = {
    "softmax, with positions": ("34.1 / 29.6", ""),
    "sum": ("38.3 / 33.0", ""),
    "delta": ("35.5 / 31.1", ""),
    "sum, carried": ("", "- / >260"),
    "delta, carried": ("", "- / 29.4"),
}
_SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {
        "overrides": ["data.path=data/smoke", "train.steps=5", "train.batch=4", "model.layers=2"],
        "stride": 64,
        "tokens": 1000,
    },
    "small": {"overrides": [], "stride": 16, "tokens": None},
    "full": {"recipe": "wikitext103-small", "overrides": [], "stride": 1, "tokens": None},
}


_SEEDS: dict[Scale, list[list[str]]] = {
    "smoke": [[]],
    "small": [[], ["train.seed=1"]],
    "full": [[]],
}
"""Overrides of a seed; none keeps the recipe's."""
_FIRST_DRAWN = 64


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Train a model with the trainer, which can resume, and return its perplexities: over windows
    that slide by point["stride"] tokens and, for models without positions, over the held-out text
    as one sequence.

    FileNotFoundError, with the command that builds the data, where there is none.
    """
    run = trained_run(point, run_folder(point, RUNS), "TEXT --vocab 4096 --held-out 40")
    sliding = _evaluated(run, point, endless=False)
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens": sliding.tokens,
    }
    result |= _perplexities(sliding, run, "")
    if run.recipe.model.position == "none":
        endless = _evaluated(run, point, endless=True)
        result |= _perplexities(endless, run, "endless_") | {"by_position": endless.by_position()}
    return result


def _evaluated(run: Run, point: dict[str, Any], endless: bool) -> Evaluation:
    data, rows = run.recipe.data, run.recipe.train.batch
    if endless:
        stream = HeldOutStream(data.path, rows * data.length, point["tokens"])
        # As many tokens at a time as a batch of training has, in one row that goes on.
        return evaluate(run.model, run.task, stream, 1, run.dtype, carry=True)
    return evaluate(
        run.model,
        run.task,
        HeldOutStream(data.path, data.length, point["tokens"], point["stride"]),
        rows,
        run.dtype,
    )


def _perplexities(evaluation: Evaluation, run: Run, kind: str) -> dict[str, float]:
    text = HeldOutStream(run.recipe.data.path, run.recipe.data.length)
    perplexities = {f"{kind}perplexity": evaluation.perplexity}
    if text.words is not None and text.tokens == evaluation.tokens:
        perplexities[f"{kind}word_perplexity"] = evaluation.word_perplexity(text.words)
    return perplexities


def _points(scale: Scale) -> list[Point]:
    size = {"recipe": "fast-weights-small", **_SIZES[scale]}
    return [
        {**size, "model": name, "overrides": [*size["overrides"], *settings, *seed]}
        for seed in _SEEDS[scale]
        for name, settings in _MODELS.items()
    ]


def _report(rows: list[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    by_model: dict[str, list[dict[str, Any]]] = {}
    curves: dict[str, dict[int, list[float]]] = {}
    for point, result in rows:
        by_model.setdefault(point["model"], []).append(result)
        for bucket in result.get("by_position", ()):
            # Buckets before that position have only a few tokens of a single text.
            if bucket["first"] >= _FIRST_DRAWN:
                curves.setdefault(point["model"], {}).setdefault(bucket["first"], []).append(
                    bucket["loss"]
                )
    lines(
        curves,
        {},
        folder / "language.png",
        "first position of a bucket, without truncation",
        "nats a token",
        logarithmic="x",
    )
    point, result = rows[0]
    text = (
        f"Recipe {point['recipe']}: perplexity of {result['tokens']:,} held-out tokens, in "
        "brackets a word's. Truncated: sliding windows,\n"
        f"by {point['stride']} tokens each; untruncated: the text as one, states carried from its "
        "first token on. "
        f"Perplexities: {seeds(len(by_model['delta']))}.\n\n"
        "| model | parameters | truncated | untruncated | published: truncated | untruncated "
        "|\n|---|---|---|---|---|---|\n"
    )
    for model, results in by_model.items():
        published = _PUBLISHED.get(model, ("", ""))
        cells = [
            model,
            f"{results[0]['parameters']:,}",
            _cell(results, ""),
            _cell(results, "endless_"),
            *published,
        ]
        text += f"| {' | '.join(cells)} |\n"
    text += (
        "\nPublished: words of WikiText-103, small / medium model, ELU features; there sum "
        "and the small delta also have positions.\n"
    )
    return text + "\n![loss by position in the text](language.png)\n"


def _cell(results: list[dict[str, Any]], kind: str) -> str:
    if f"{kind}perplexity" not in results[0]:
        return ""
    words = [
        result[f"{kind}word_perplexity"] for result in results if f"{kind}word_perplexity" in result
    ]
    tokens = mean_deviation([result[f"{kind}perplexity"] for result in results], ".2f")
    return tokens + (f" ({mean_deviation(words, '.0f')})" if words else "")


EXPERIMENT = Experiment(
    what="language models with softmax, sum and delta rule, in windows and without end (tables 2 "
    "and 4; needs data/wikipedia-long)",
    points=_points,
    run=measure,
    report=_report,
    hours={"smoke": 0.02, "small": 2.2, "full": 17_000.0},
)
