"""Memories against twice the depth, on the same tokens: loss by tokens and by seconds."""

import gc
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from memshard.bench.gpu.bench import Bench, Result, tried
from memshard.bench.gpu.data import python_shards
from memshard.data_pipeline.format.index import TRAIN, load_index
from memshard.trainer.config.load import load_recipe
from memshard.trainer.loop import evaluate_run
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step

RECIPE = """\
data: {{path: {data}, length: {length}}}
model:
  layers: 6
  dim: {dim}
  mixer: {{heads: {heads}}}
  memory: {{layers: [4], keys: {keys}, heads: 4, topk: {topk}, key_dim: {key_dim}}}
  ngram: {{rows: {rows}}}
train:
  {{steps: 1000, batch: {batch}, precision: bf16, eval_every: 0, eval_tokens: {held_out}}}
optimizer: {{lr: 1e-3, warmup: {warmup}}}
tables: {{lr: 1e-2}}
"""
LARGE = {
    "length": 256, "dim": 512, "heads": 8, "keys": 512, "topk": 32, "key_dim": 256, "batch": 64,
    "warmup": 100, "held_out": 262_144, "rows": 262_144,
}  # fmt: skip
SMALL = {
    "length": 32, "dim": 32, "heads": 2, "keys": 32, "topk": 4, "key_dim": 16, "batch": 2,
    "warmup": 2, "held_out": 1000, "rows": 1024,
}  # fmt: skip
_NO_MEMORY = "model.memory.layers=[]"
MODELS = {
    "6 layers": (_NO_MEMORY,),
    "6 layers + memory": (),
    # As many values: 16 parts of keys^2 rows, each a sixteenth as wide.
    "6 layers + n-grams": (_NO_MEMORY, "model.ngram.layers=[1]"),
    "12 layers": ("model.layers=12", _NO_MEMORY),
}
_MOST_BYTES = 40_000_000
_EPOCHS = 3
"""Most passes over the data: with more, what a memory learns by heart decides."""
_POINTS = 40
"""Points of a curve."""
_WARM, _REHEARSED = 3, 20


def run(bench: Bench) -> Iterator[tuple[str, Result]]:
    """Yield the data and the steps, then each model's curve and its held-out loss."""
    data = bench.data or python_shards(
        bench.scratch / "python", _MOST_BYTES if bench.cuda else 200_000
    )
    sizes = LARGE if bench.cuda else SMALL
    recipe = bench.scratch / "headline.yaml"
    recipe.write_text(RECIPE.format(data=data, **sizes), encoding="utf-8")
    tokens = load_index(data).splits[TRAIN].tokens
    timed = {name: _seconds(bench, recipe, name) for name in MODELS}
    a_step = sizes["batch"] * sizes["length"]
    # A tenth is for the set-up and the evaluations.
    steps = int(0.9 * bench.left() / sum(timed.values()))
    most = _EPOCHS * tokens // a_step if bench.cuda else _REHEARSED
    steps = max(2 * _WARM, min(steps, most))
    yield (
        "data",
        {
            "named": bench.data is not None,
            "tokens": tokens,
            "vocabulary": load_index(data).vocab_size,
            "steps": steps,
            "tokens a step": a_step,
        },
    )
    for name in MODELS:
        yield name, tried(partial(_learned, bench, recipe, name, steps))
        gc.collect()


def _seconds(bench: Bench, recipe: Path, name: str) -> float:
    """Return the seconds of a step, without the first ones, which compile."""
    run = set_up(load_recipe(recipe, MODELS[name]), bench.scratch / f"{name}, timed", bench.device)
    for _ in range(_WARM):
        train_step(run)
    bench.wait()
    begun = time.monotonic()
    for _ in range(_WARM):
        train_step(run)
    bench.wait()
    return (time.monotonic() - begun) / _WARM


def _learned(bench: Bench, recipe: Path, name: str, steps: int) -> Result:
    overrides = (*MODELS[name], f"train.steps={steps}")
    run = set_up(load_recipe(recipe, overrides), bench.scratch / name, bench.device)
    a_step = run.recipe.train.batch * run.recipe.data.length
    every = max(1, steps // _POINTS)
    curve: list[tuple[int, float, float]] = []
    losses: list[float] = []
    begun = time.monotonic()
    for step in range(1, steps + 1):
        losses.append(train_step(run).loss)
        if step % every == 0:
            # A mean of all losses since the last point; `loss` has waited for the device.
            curve.append((step * a_step, time.monotonic() - begun, sum(losses) / len(losses)))
            losses.clear()
    seconds = time.monotonic() - begun
    loss = evaluate_run(run).loss
    return {
        "held_out_loss": loss,
        "perplexity": math.exp(loss),
        "seconds": seconds,
        "curve": curve,
        "ok": math.isfinite(loss),
    }
