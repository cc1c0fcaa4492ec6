"""The studies of product-key memories (Lample et al. 2019, section 4), each a table of models that differ in some recipe keys."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from memshard.search.reproduce.catalogue import Experiment, Point, Scale
from memshard.search.reproduce.pkm_report import report
from memshard.search.reproduce.pkm_runs import run_point


@dataclass(frozen=True)
class Size:
    """A scale. recipe, overrides: of a model with one memory. depths: the paper's 12, 16 and 24. keys: numbers of sub-keys compared;
    flat: those also compared with flat keys. reads: slots a token reads. steps: of a study and of the headline; seeds, likewise.
    clock: rounds of timing. wide: overrides of the headline's models for timing at the published width.
    """

    recipe: str
    overrides: tuple[str, ...]
    depths: tuple[int, int, int]
    keys: tuple[int, ...]
    flat: tuple[int, ...]
    reads: int
    steps: tuple[int, int]
    seeds: tuple[int, int]
    clock: int
    wide: tuple[str, ...] = ()


_PAPER_WIDTH = (
    "model.layers=12", "model.dim=1024", "model.mixer.heads=16", "model.memory.layers=[5]", "model.memory.keys=512",
    "model.memory.topk=32", "model.memory.key_dim=512", "train.batch=4",
)  # fmt: skip
_TINY = (
    "data.path=data/smoke", "data.length=32", "model.layers=2", "model.dim=32", "model.mixer.heads=2", "model.memory.layers=[1]",
    "model.memory.keys=16", "model.memory.heads=2", "model.memory.topk=4", "model.memory.key_dim=16", "train.batch=2",
    "train.precision=fp32", "train.eval_tokens=2048", "optimizer.warmup=1",
)  # fmt: skip
_SIZES: dict[Scale, Size] = {
    "smoke": Size("pkm-small", _TINY, (2, 3, 4), (4, 16), (16,), 8, (2, 3), (1, 2), 1),
    "small": Size("pkm-small", (), (6, 8, 12), (64, 128, 256, 512), (32, 64, 128), 32, (600, 1200), (2, 3), 9, _PAPER_WIDTH),
    "full": Size(
        "lample2019", ("model.layers=6", "model.memory.layers=[4]", "model.memory.keys=512"), (12, 16, 24),
        (128, 256, 384, 512, 768, 1024), (128, 256), 64, (250_000, 250_000), (1, 1), 9,
    ),
}  # fmt: skip

Model = dict[str, Any]
"""builder and overrides, on top of those of the scale."""


def _model(*overrides: str, builder: str = "transformer") -> Model:
    return {"builder": builder, "overrides": overrides}


_NO_MEMORY = "model.memory.layers=[]"


def _at(*layers: int) -> str:
    return f"model.memory.layers={list(layers)}"


def _headline(size: Size) -> dict[str, Model]:
    shallow, _, deep = size.depths
    return {
        f"{shallow} layers": _model(f"model.layers={shallow}", _NO_MEMORY),
        f"{shallow} layers + memory": _model(f"model.layers={shallow}"),
        f"{deep} layers": _model(f"model.layers={deep}", _NO_MEMORY),
    }


def _keys(size: Size) -> dict[str, Model]:
    return {
        f"{keys**2:,} slots, {'batch norm' if norm == 'batch' else 'no norm'}": _model(
            f"model.memory.keys={keys}", f"model.memory.query_norm={norm}"
        )
        for norm in ("none", "batch")
        for keys in size.keys
    }


def _points(models: Callable[[Size], dict[str, Model]], headline: bool, scale: Scale) -> list[Point]:
    """Training runs, seed by seed, and then, when no others disturb them, the comparisons of speed."""
    size = _SIZES[scale]
    found = {
        label: {
            "recipe": size.recipe,
            "builder": model["builder"],
            "overrides": [*size.overrides, f"train.steps={size.steps[headline]}", *model["overrides"]],
        }
        for label, model in models(size).items()
    }
    points: list[Point] = [
        {"label": label, **model, "overrides": [*model["overrides"], f"train.seed={seed}"]}
        for seed in range(1, size.seeds[headline] + 1)
        for label, model in found.items()
    ]
    points.append({"clock": size.clock, "title": "Speed", "models": found, "trained": list(found)})
    if headline and size.wide:
        points.append(_wide_clock(size))
    return points


def _wide_clock(size: Size) -> Point:
    """Training steps of the deep model would take too much memory."""
    base = {"recipe": size.recipe, "builder": "transformer"}
    models = {
        "12 layers": {**base, "overrides": [*size.wide, _NO_MEMORY]},
        "12 layers + memory": {**base, "overrides": [*size.wide]},
        "24 layers": {**base, "overrides": [*size.wide, "model.layers=24", _NO_MEMORY]},
    }
    title = "Speed at the published width of 1,024, not trained"
    return {"clock": 5, "title": title, "models": models, "trained": ["12 layers", "12 layers + memory"]}


def _study(
    name: str,
    what: str,
    models: Callable[[Size], dict[str, Model]],
    hours: tuple[float, float, float],
    published: dict[str, str] | None = None,
    headline: bool = False,
) -> Experiment:
    return Experiment(
        what=what,
        points=partial(_points, models, headline),
        run=run_point,
        report=partial(report, name=name, published=published or {}),
        hours=dict(zip(("smoke", "small", "full"), hours, strict=True)),
    )


HEADLINE = _study(
    "headline",
    "a memory against twice the depth: perplexity, training and inference time a token (Lample et al. 2019, table 2)",
    _headline,
    (0.01, 1.6, 30_000),
    {"6 layers": "17.7 (12 layers)", "6 layers + memory": "15.6 (12 + 1)", "12 layers": "16.0 (24)"},
    headline=True,
)
KEYS = _study(
    "keys",
    "number of slots, with and without batch norm of queries: perplexity, usage, KL (tables 3 and 4)",
    _keys,
    (0.01, 1.4, 20_000),
)
