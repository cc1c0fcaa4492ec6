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
    """A scale. recipe, overrides: of a model of `layers` layers with one memory. depths: the paper's 12, 16 and 24. keys: numbers of
    sub-keys compared; flat: those also compared with flat keys; peer_keys: for PEER, whose two tables are then as large as the one.
    reads: slots a token reads. steps: of a study and of the headline; seeds, likewise. clock: rounds of timing. wide: overrides of the
    headline's models for timing at the published width.
    """

    recipe: str
    overrides: tuple[str, ...]
    layers: int
    depths: tuple[int, int, int]
    keys: tuple[int, ...]
    flat: tuple[int, ...]
    peer_keys: int
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
    "data.path=data/smoke", "data.length=32", "model.layers=4", "model.dim=32", "model.mixer.heads=2", "model.memory.layers=[1]",
    "model.memory.keys=32", "model.memory.heads=2", "model.memory.topk=4", "model.memory.key_dim=16", "train.batch=2",
    "train.precision=fp32", "train.eval_tokens=2048", "optimizer.warmup=1",
)  # fmt: skip
_SIZES: dict[Scale, Size] = {
    "smoke": Size("pkm-small", _TINY, 4, (2, 3, 4), (8, 16), (8,), 11, 8, (2, 3), (1, 2), 1),
    "small": Size(
        "pkm-small", (), 6, (6, 8, 12), (64, 128, 256, 512), (32, 64, 128), 181, 32, (600, 1200), (2, 3), 9, _PAPER_WIDTH
    ),
    "full": Size(
        "lample2019", ("model.layers=6", "model.memory.layers=[4]", "model.memory.keys=512"), 6, (12, 16, 24),
        (128, 256, 384, 512, 768, 1024), (128, 256), 362, 64, (250_000, 250_000), (1, 1), 9,
    ),
}  # fmt: skip

Model = dict[str, Any]
"""builder and overrides, on top of those of the scale."""


def _model(*overrides: str, builder: str = "transformer") -> Model:
    return {"builder": builder, "overrides": overrides}


_NO_MEMORY = "model.memory.layers=[]"


def _at(*layers: int) -> str:
    return f"model.memory.layers={list(layers)}"


def _spread(layers: int, memories: int) -> str:
    """Evenly through the middle of the model."""
    return _at(*(round(layers * (number + 1) / (memories + 1)) for number in range(memories)))


def _headline(size: Size) -> dict[str, Model]:
    shallow, _, deep = size.depths
    return {
        f"{shallow} layers": _model(f"model.layers={shallow}", _NO_MEMORY),
        f"{shallow} layers + memory": _model(f"model.layers={shallow}"),
        f"{deep} layers": _model(f"model.layers={deep}", _NO_MEMORY),
    }


def _depth(size: Size) -> dict[str, Model]:
    return {
        f"{layers} layers + {memories}": _model(f"model.layers={layers}", _spread(layers, memories))
        for memories in range(4)
        for layers in size.depths
        if memories < layers
    }


def _position(size: Size) -> dict[str, Model]:
    return {"none": _model(_NO_MEMORY)} | {f"layer {layer + 1}": _model(_at(layer)) for layer in range(size.layers)}


def _heads(size: Size) -> dict[str, Model]:
    pairs = [(heads, size.reads // heads) for heads in (1, 2, 4, 8)]
    return {f"{heads} x {topk}": _model(f"model.memory.heads={heads}", f"model.memory.topk={topk}") for heads, topk in pairs}


def _keys(size: Size) -> dict[str, Model]:
    return {
        f"{keys**2:,} slots, {'batch norm' if norm == 'batch' else 'no norm'}": _model(
            f"model.memory.keys={keys}", f"model.memory.query_norm={norm}"
        )
        for norm in ("none", "batch")
        for keys in size.keys
    }


def _flat(size: Size) -> dict[str, Model]:
    builders = {"product": "transformer", "flat": "flat keys"}
    return {
        f"{keys**2:,} slots, {kind} keys": _model(f"model.memory.keys={keys}", builder=builder)
        for keys in size.flat
        for kind, builder in builders.items()
    }


def _gates(size: Size) -> dict[str, Model]:
    three = _spread(size.layers, 3)
    return {
        "softmax": _model(),
        "sigmoid": _model("model.memory.weighting=sigmoid"),
        "relu": _model("model.memory.weighting=relu"),
        "added to the feedforward": _model("model.memory.mode=add"),
        "Memory+": _model("model.memory.gate=true"),
        "3 layers, a table each": _model(three),
        "3 layers, one table": _model(three, "model.memory.share=true"),
        "3 layers, one table, Memory+": _model(three, "model.memory.share=true", "model.memory.gate=true"),
    }


def _alternatives(size: Size) -> dict[str, Model]:
    return {
        "feedforward": _model(_NO_MEMORY),
        "feedforward of equal operations": _model(builder="feedforward of equal operations"),
        "product-key memory": _model(),
        "Memory+": _model("model.memory.gate=true"),
        "PEER": _model("model.memory.kind=peer", f"model.memory.keys={size.peer_keys}"),
        "mixture of experts, 1 active": _model(builder="mixture of experts, 1 active"),
        "mixture of experts, 2 active": _model(builder="mixture of experts, 2 active"),
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
    hours: float,
    published: dict[str, str] | None = None,
    headline: bool = False,
) -> Experiment:
    """hours: of scale small."""
    return Experiment(
        what=what,
        points=partial(_points, models, headline),
        run=run_point,
        report=partial(report, name=name, published=published or {}),
        hours={"smoke": 0.01, "small": hours, "full": 1e6},
    )


HEADLINE = _study(
    "headline",
    "a memory against twice the depth: perplexity, training and inference time a token (table 2)",
    _headline,
    1.4,
    {"6 layers": "17.7 (12 layers)", "6 layers + memory": "15.6 (12 + 1)", "12 layers": "16.0 (24)"},
    headline=True,
)
DEPTH = _study(
    "depth",
    "none to three memories in models of three depths (table 2)",
    _depth,
    2.3,
    {
        "6 layers + 0": "17.7 (12 layers)",
        "8 layers + 0": "16.7 (16)",
        "12 layers + 0": "16.0 (24)",
        "6 layers + 1": "15.6",
        "8 layers + 1": "14.9",
        "12 layers + 1": "14.6",
        "6 layers + 2": "14.8",
        "8 layers + 2": "14.1",
        "6 layers + 3": "14.5",
    },
)
POSITION = _study(
    "position",
    "which layer of six holds the memory (table 3)",
    _position,
    0.9,
    {"layer 1": "21.5", "layer 2": "20.7", "layer 3": "20.4", "layer 4": "20.1", "layer 5": "19.8", "layer 6": "20.3"},
)
HEADS = _study(
    "heads", "heads x slots of a head, at equal reads (figure 4)", _heads, 0.6, dict.fromkeys(_heads(_SIZES["full"]), "about 20.5")
)
KEYS = _study(
    "keys",
    "number of slots, with and without batch norm of queries: perplexity, usage, KL (table 4)",
    _keys,
    1.1,
    {
        "16,384 slots, no norm": "22.8, used 100 %, KL 0.56",
        "65,536 slots, no norm": "21.7, 99.0 %, 0.69",
        "147,456 slots, no norm": "20.9, 83.8 %, 0.94",
        "262,144 slots, no norm": "20.5, 64.4 %, 1.20",
        "589,824 slots, no norm": "20.0, 38.0 %, 1.70",
        "1,048,576 slots, no norm": "19.8, 25.8 %, 2.06",
        "16,384 slots, batch norm": "23.0, 100 %, 0.56",
        "65,536 slots, batch norm": "21.9, 100 %, 0.58",
        "147,456 slots, batch norm": "20.7, 99.6 %, 0.65",
        "262,144 slots, batch norm": "19.8, 97.9 %, 0.68",
        "589,824 slots, batch norm": "18.7, 90.3 %, 0.83",
        "1,048,576 slots, batch norm": "18.0, 80.3 %, 0.95",
    },
)
FLAT = _study("flat", "product keys against a key for every slot: perplexity, usage, KL (table 5)", _flat, 1.2)
GATES = _study("gates", "softmax, sigmoid, relu; replace or add; Memory+; one table for three layers", _gates, 1.2)
ALTERNATIVES = _study(
    "alternatives",
    "a memory against feedforwards, PEER and mixtures of experts of equal parameters",
    _alternatives,
    1.1,
)
