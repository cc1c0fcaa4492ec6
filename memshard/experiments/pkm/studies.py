"""The studies of product-key memories (Lample et al. 2019, section 4), each a table of models that
differ in some recipe keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from memshard.experiments.common.catalogue import Experiment, Point, Scale
from memshard.experiments.pkm.report import report
from memshard.experiments.pkm.runs import run_point


@dataclass(frozen=True)
class Size:
    """The sizes of a scale.

    recipe, overrides: a model of `layers` layers with one memory of `slots`. depths: in place of
    the paper's 12, 16 and 24 layers. keys: numbers of sub-keys compared; flat: those also compared
    with flat keys; peer: overrides for PEER, which make its two tables as large as the memory's
    one. reads: slots a token reads. steps: training steps. seeds: number of seeds of a study and of
    the headline. clock: rounds of timing. wide: overrides of the headline's models for timing at
    the published width.
    """

    recipe: str
    overrides: tuple[str, ...]
    layers: int
    depths: tuple[int, int, int]
    slots: int
    keys: tuple[int, ...]
    flat: tuple[int, ...]
    peer: tuple[str, ...]
    reads: int
    steps: int
    seeds: tuple[int, int]
    clock: int
    wide: tuple[str, ...] = ()


_PAPER_WIDTH = (
    "model.layers=12",
    "model.dim=1024",
    "model.mixer.heads=16",
    "model.memory.layers=[5]",
    "model.memory.keys=512",
    "model.memory.topk=32",
    "model.memory.key_dim=512",
    "train.batch=32",
    "train.micro_batch=16",
)
_TINY = (
    "data.path=data/smoke",
    "data.length=32",
    "model.layers=4",
    "model.dim=32",
    "model.mixer.heads=2",
    "model.memory.layers=[1]",
    "model.memory.keys=32",
    "model.memory.heads=2",
    "model.memory.topk=4",
    "model.memory.key_dim=16",
    "train.batch=2",
    "train.precision=fp32",
    "train.eval_tokens=2048",
    "optimizer.warmup=1",
)
_SIZES: dict[Scale, Size] = {
    "smoke": Size(
        "pkm-small",
        _TINY,
        4,
        (2, 3, 4),
        1024,
        (8, 16),
        (8,),
        ("model.memory.keys=23",),
        8,
        2,
        (1, 2),
        1,
    ),
    "small": Size(
        "pkm-small",
        (),
        6,
        (6, 8, 12),
        65_536,
        (64, 128, 256, 512),
        (32, 64, 128),
        # PEER has two tables: 2 x 181^2 rows are as many as the memory's 256^2, within 0.03 %.
        ("model.memory.keys=181", "tables.lr=4e-3"),  # of 1e-3, 4e-3, 1e-2 and 3e-2 the best
        32,
        600,
        (2, 3),
        9,
        _PAPER_WIDTH,
    ),
    "full": Size(
        "lample2019",
        ("model.layers=6", "model.memory.layers=[4]", "model.memory.keys=512"),
        6,
        (12, 16, 24),
        262_144,
        (128, 256, 384, 512, 768, 1024),
        (128, 256),
        ("model.memory.keys=362",),
        64,
        250_000,
        (1, 1),
        9,
    ),
}

Model = dict[str, Any]
"""builder and overrides, on top of those of the scale; published, the paper's figures for it."""


def variant(*overrides: str, builder: str = "transformer", published: str = "") -> Model:
    """Return a model of a study; see `Model`."""
    return {"builder": builder, "overrides": overrides, "published": published}


NO_MEMORY = "model.memory.layers=[]"


def _at(*layers: int) -> str:
    return f"model.memory.layers={list(layers)}"


def _evenly(layers: int, memories: int) -> str:
    """Spread memories evenly, with the last one late: a single one of six layers is in the fifth,
    the paper's best place.
    """
    # Layer numbers from 0: one memory in six layers gives 4.
    return _at(*(layers * (2 * number + 2) // (2 * memories + 1) for number in range(memories)))


# Perplexities of the paper's models of 12, 16 and 24 layers, by number of memories.
_BY_DEPTH = (("17.7", "16.7", "16.0"), ("15.6", "14.9", "14.6"), ("14.8", "14.1"), ("14.5",))
_BY_POSITION = ("21.5", "20.7", "20.4", "20.1", "19.8", "20.3")
# Perplexity, usage and KL by sub-keys: without and with batch norm.
_BY_KEYS = {
    128: ("22.8, 100 %, 0.56", "23.0, 100 %, 0.56"),
    256: ("21.7, 99.0 %, 0.69", "21.9, 100 %, 0.58"),
    384: ("20.9, 83.8 %, 0.94", "20.7, 99.6 %, 0.65"),
    512: ("20.5, 64.4 %, 1.20", "19.8, 97.9 %, 0.68"),
    768: ("20.0, 38.0 %, 1.70", "18.7, 90.3 %, 0.83"),
    1024: ("19.8, 25.8 %, 2.06", "18.0, 80.3 %, 0.95"),
}


_FLAT = {"product": "97 to 100 %", "flat": "10 to 20 %"}


def _headline(size: Size) -> dict[str, Model]:
    shallow, _, deep = size.depths
    return {
        f"{shallow} layers": variant(
            f"model.layers={shallow}", NO_MEMORY, published="17.7 (12 layers)"
        ),
        f"{shallow} layers + memory": variant(
            f"model.layers={shallow}", published="15.6 (12 layers + memory)"
        ),
        f"{deep} layers": variant(f"model.layers={deep}", NO_MEMORY, published="16.0 (24 layers)"),
    }


def _shuffled(size: Size) -> dict[str, Model]:
    return {
        label: {**model, "overrides": (*model["overrides"], "data.order=shuffled")}
        for label, model in _headline(size).items()
    }


def _depth(size: Size) -> dict[str, Model]:
    models = {}
    for memories, published in enumerate(_BY_DEPTH):
        for number, layers in enumerate(size.depths):
            if memories < layers:
                quoted = (
                    f"{published[number]} ({(12, 16, 24)[number]} layers)"
                    if number < len(published)
                    else ""
                )
                models[f"{layers} layers + {memories}"] = variant(
                    f"model.layers={layers}", _evenly(layers, memories), published=quoted
                )
    return models


def _position(size: Size) -> dict[str, Model]:
    layers = range(size.layers)
    return {"none": variant(NO_MEMORY)} | {
        f"layer {n + 1}": variant(_at(n), published=_BY_POSITION[n]) for n in layers
    }


def _heads(size: Size) -> dict[str, Model]:
    # The reads of a token stay the same, so that only how they are divided differs.
    pairs = [(heads, size.reads // heads) for heads in (1, 2, 4, 8)]
    return {"none": variant(NO_MEMORY)} | {
        f"{heads} x {topk}": variant(
            f"model.memory.heads={heads}",
            f"model.memory.topk={topk}",
            published="about 20.5, 70 % (64 reads)",
        )
        for heads, topk in pairs
    }


def _keys(size: Size) -> dict[str, Model]:
    return {"none": variant(NO_MEMORY)} | {
        f"{keys**2:,} slots, {'batch norm' if norm == 'batch' else 'no norm'}": variant(
            f"model.memory.keys={keys}",
            f"model.memory.query_norm={norm}",
            # False is 0: the first entry is without batch norm.
            published=_BY_KEYS.get(keys, ("", ""))[norm == "batch"],
        )
        for norm in ("none", "batch")
        for keys in size.keys
    }


def _flat(size: Size) -> dict[str, Model]:
    builders = {"product": "transformer", "flat": "flat keys"}
    return {"none": variant(NO_MEMORY)} | {
        f"{keys**2:,} slots, {kind} keys": variant(
            f"model.memory.keys={keys}", builder=builder, published=_FLAT[kind]
        )
        for keys in size.flat
        for kind, builder in builders.items()
    }


def _gates(size: Size) -> dict[str, Model]:
    three = _evenly(size.layers, 3)
    return {
        "none": variant(NO_MEMORY),
        "softmax": variant(),
        "sigmoid": variant("model.memory.weighting=sigmoid"),
        "relu": variant("model.memory.weighting=relu"),
        "added to the feedforward": variant("model.memory.mode=add"),
        "Memory+": variant("model.memory.gate=true"),
        "3 layers, a table each": variant(three),
        "3 layers, one table": variant(three, "model.memory.share=true"),
        "3 layers, one table, Memory+": variant(
            three, "model.memory.share=true", "model.memory.gate=true"
        ),
    }


def _alternatives(size: Size) -> dict[str, Model]:
    return {
        "feedforward": variant(NO_MEMORY),
        "feedforward of equal operations": variant(builder="feedforward of equal operations"),
        "product-key memory": variant(),
        "Memory+": variant("model.memory.gate=true"),
        "PEER": variant("model.memory.kind=peer", *size.peer),
        "mixture of experts, 1 active": variant(builder="mixture of experts, 1 active"),
        "mixture of experts, 2 active": variant(builder="mixture of experts, 2 active"),
    }


def _points(
    models: Callable[[Size], dict[str, Model]],
    headline: bool,
    timed: bool,
    wide: bool,
    scale: Scale,
) -> list[Point]:
    """Return the training runs, seed by seed, and the comparisons of speed if timed."""
    size = _SIZES[scale]
    recipes = {
        label: {
            "recipe": size.recipe,
            "builder": model["builder"],
            "overrides": [*size.overrides, f"train.steps={size.steps}", *model["overrides"]],
        }
        for label, model in models(size).items()
    }
    published = {label: model["published"] for label, model in models(size).items()}
    points: list[Point] = [
        {
            "label": label,
            **model,
            "overrides": [*model["overrides"], f"train.seed={seed}"],
            "published": published[label],
        }
        # Seeds in the outer loop: an interrupted study has all its models with fewer seeds.
        for seed in range(1, size.seeds[headline] + 1)
        for label, model in recipes.items()
    ]
    if timed:
        points.append(
            {"clock": size.clock, "title": "Speed", "models": recipes, "trained": list(recipes)}
        )
    if wide and size.wide:
        points.append(_wide_clock(size))
    return points


def _wide_clock(size: Size) -> Point:
    """Return a comparison of speed at the published width.

    Training steps of the deep model would take too much memory, so it only makes inferences.
    """
    base = {"recipe": size.recipe, "builder": "transformer"}
    models = {
        "12 layers": {**base, "overrides": [*size.wide, NO_MEMORY]},
        "12 layers + memory": {**base, "overrides": [*size.wide]},
        "12 layers + memory of bf16": {**base, "overrides": [*size.wide, "tables.dtype=bf16"]},
        "24 layers": {**base, "overrides": [*size.wide, "model.layers=24", NO_MEMORY]},
    }
    title = "Speed at the published width of 1,024, not trained"
    return {
        "clock": 5,
        "title": title,
        "models": models,
        "trained": [label for label in models if label != "24 layers"],
    }


def study(
    name: str,
    what: str,
    models: Callable[[Size], dict[str, Model]],
    hours: float,
    headline: bool = False,
    timed: bool = True,
    wide: bool = False,
) -> Experiment:
    """Return a study. hours: processor time at scale small, if no other study shares its models.
    headline: whether it has the seeds of the headline; wide: whether the headline's models are
    timed at the published width as well.
    """
    return Experiment(
        what=f"{what} (needs data/pkm, at scale smoke data/smoke)",
        points=partial(_points, models, headline, timed, wide),
        run=run_point,
        report=partial(report, name=name),
        hours={"smoke": 0.01, "small": hours, "full": 1e6},
        alone=lambda point: "clock" in point,
    )


_TIMES = "perplexity, training and inference time a token"
HEADLINE = study(
    "headline",
    f"a memory against twice the depth: {_TIMES}",
    _headline,
    1.1,
    headline=True,
    wide=True,
)
SHUFFLED = study(
    "shuffled",
    "the headline's models on shuffled sequences",
    _shuffled,
    1.0,
    headline=True,
    timed=False,
)
DEPTH = study("depth", "none to three memories in models of three depths", _depth, 3.0)
POSITION = study("position", "which layer of six holds the memory", _position, 1.4)
HEADS = study("heads", "heads x slots of a head, at equal reads", _heads, 1.0)
KEYS = study(
    "keys",
    "number of slots, with and without batch norm of queries: perplexity, usage, KL",
    _keys,
    1.8,
)
FLAT = study("flat", "product keys against a key for every slot: perplexity, usage, KL", _flat, 2.1)
GATES = study(
    "gates",
    "softmax, sigmoid, relu; replace or add; Memory+; one table for three layers",
    _gates,
    1.8,
)
ALTERNATIVES = study(
    "alternatives",
    "a memory against feedforwards, PEER and mixtures of experts of equal parameters",
    _alternatives,
    1.5,
)
