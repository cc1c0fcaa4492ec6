"""Language models: sum rule against delta rule, truncated and endless contexts (Schlag et al. 2021, tables 2 and 4)."""

from pathlib import Path
from typing import Any

from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.search.reproduce.catalogue import Experiment, Point, Scale
from memshard.search.reproduce.curves import lines
from memshard.search.reproduce.trained import finish, folder_of, prepare
from memshard.trainer.evaluation.perplexity import Evaluation, evaluate
from memshard.trainer.run import Run

RUNS = Path("runs/reproduce/fast_weights/language/runs")

_SUM = ["model.mixer.kind=linear"]
_CARRIED = ["train.carry_state=true", "model.position=none"]
# As published, the sum rule keeps its attention normalisation everywhere: without it an endless context is worse still (above 1,600).
_MODELS: dict[str, list[str]] = {
    "delta": [],
    "sum": _SUM,
    "delta, carried": _CARRIED,
    "sum, carried": [*_SUM, *_CARRIED],
    "softmax, with positions": ["model.mixer.kind=softmax", "model.position=sinusoidal"],
}
# Word perplexities of the test set, small and medium, read from tables 2 to 4: with truncated contexts, and without.
_PUBLISHED: dict[str, tuple[str, str]] = {
    "softmax, with positions": ("34.1 / 29.6", ""),
    "sum": ("38.3 / 33.0", ""),
    "delta": ("35.5 / 31.1", ""),
    "sum, carried": ("", "- / >260"),
    "delta, carried": ("", "- / 29.4"),
}
_SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"overrides": ["data.path=data/smoke", "train.steps=5", "train.batch=4", "model.layers=2"], "stride": 64, "tokens": 1000},
    "small": {"overrides": [], "stride": 16, "tokens": None},
    "full": {"recipe": "wikitext103-small", "overrides": [], "stride": 1, "tokens": None},
}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Train a model as a run of the trainer that resumes, then evaluate: windows that slide by point["stride"] tokens, and, of models
    without positions, the held-out text as one.

    FileNotFoundError, with the command that builds it, without the data.
    """
    run = prepare(point, folder_of(point, RUNS), "TEXT --vocab 4096 --held-out 40")
    finish(run)
    sliding = _evaluated(run, point, endless=False)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in run.model.parameters()), "tokens": sliding.tokens}
    result |= _perplexities(sliding, run, "")
    if run.recipe.model.position == "none":
        endless = _evaluated(run, point, endless=True)
        result |= _perplexities(endless, run, "endless_") | {"by_position": endless.by_position()}
    return result


def _evaluated(run: Run, point: dict[str, Any], endless: bool) -> Evaluation:
    data, rows = run.recipe.data, run.recipe.train.batch
    if endless:
        stream = HeldOutStream(data.path, rows * data.length, point["tokens"])
        return evaluate(run.model, run.task, stream, 1, run.dtype, carry=True)
    return evaluate(run.model, run.task, HeldOutStream(data.path, data.length, point["tokens"], point["stride"]), rows, run.dtype)


def _perplexities(evaluation: Evaluation, run: Run, kind: str) -> dict[str, float]:
    text = HeldOutStream(run.recipe.data.path, run.recipe.data.length)
    found = {f"{kind}perplexity": evaluation.perplexity}
    if text.words is not None and text.tokens == evaluation.tokens:
        found[f"{kind}word_perplexity"] = evaluation.word_perplexity(text.words)
    return found


def _points(scale: Scale) -> list[Point]:
    size = {"recipe": "fast-weights-small", **_SIZES[scale]}
    return [{**size, "model": name, "overrides": [*size["overrides"], *settings]} for name, settings in _MODELS.items()]


def _report(rows: list[tuple[Point, dict[str, Any]]], folder: Path) -> str:
    curves = {
        point["model"]: {bucket["first"] + 1: bucket["loss"] for bucket in result["by_position"]}
        for point, result in rows
        if "by_position" in result
    }
    lines(curves, {}, folder / "language.png", "tokens read before, without truncation", "nats a token", logarithmic="x")
    point, result = rows[0]
    text = (
        f"Recipe {point['recipe']}: perplexity of {result['tokens']:,} held-out tokens, in brackets a word's. Truncated: sliding windows,\n"
        f"by {point['stride']} tokens each; untruncated: the text as one, states carried from its first token on. One seed.\n\n"
        "| model | parameters | truncated | untruncated | published: truncated | untruncated |\n|---|---|---|---|---|---|\n"
    )
    for point, result in rows:
        published = _PUBLISHED.get(point["model"], ("", ""))
        cells = [point["model"], f"{result['parameters']:,}", _cell(result, ""), _cell(result, "endless_"), *published]
        text += f"| {' | '.join(cells)} |\n"
    text += "\nPublished: words of WikiText-103, small / medium model, ELU features; there sum and the small delta have positions, too.\n"
    return text + "\n![loss by tokens read before](language.png)\n"


def _cell(result: dict[str, Any], kind: str) -> str:
    if f"{kind}perplexity" not in result:
        return ""
    words = result.get(f"{kind}word_perplexity")
    return f"{result[f'{kind}perplexity']:.2f}" + (f" ({words:.0f})" if words else "")


EXPERIMENT = Experiment(
    what="language models with softmax, sum and delta rule, in windows and without end (tables 2 and 4; needs data/wikipedia-long)",
    points=_points,
    run=measure,
    report=_report,
    hours={"smoke": 0.02, "small": 1.5, "full": 17_000.0},
)
