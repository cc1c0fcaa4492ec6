"""The speed of 12 layers of width 1,024 without and with a memory of a million rows: MFU, seconds a
step, and the memory that a step takes against what `memshard plan` says. One step's profile.
"""

import gc
import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import torch

from memshard.bench.gpu.bench import Bench, Result, tried
from memshard.bench.gpu.data import random_shards
from memshard.trainer.config.load import load_recipe
from memshard.trainer.cost.estimate import estimate
from memshard.trainer.run import Run
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step
from memshard.trainer.watch.meter import Meter
from memshard.trainer.watch.profile import FOLDER, StepProfiler

RECIPE = "wide"
SMALL = (
    "data.length=64",
    "model.layers=2",
    "model.dim=64",
    "model.memory.layers=[1]",
    "model.memory.keys=32",
    "model.memory.topk=4",
    "model.memory.key_dim=32",
    "train.batch=2",
)
"""Changes of the recipe for a CPU."""
_STOCHASTIC = ("tables.dtype=bf16", "tables.rounding=stochastic")
MODELS = {
    "no memory": ("model.memory.layers=[]",),
    "memory": (),
    "memory of bf16": _STOCHASTIC,
    "memory of bf16, scores in tf32": (*_STOCHASTIC, "model.memory.score_precision=tf32"),
    # A quarter of the sub-keys: to draw a million rows on the CPU takes too long.
    "memory in the host": ("tables.place=host", "model.memory.keys={host_keys}"),
}
PROFILED = ("no memory", "memory")
_WARM, _TIMED, _KERNELS = 3, 10, 40
_LARGE_MEMORY = 60e9


def run(bench: Bench) -> Iterator[tuple[str, Result]]:
    """Yield speed and memory of every model, and the profiles of two."""
    changes = _changes(bench)
    dense: float | None = None
    for name in MODELS:
        if bench.left() < 0:
            yield name, {"skipped": "no time left"}
            continue
        result = tried(partial(_model, bench, changes, name))
        if "step_s" in result:
            dense = dense or result["step_s"]
            result["times the step without"] = result["step_s"] / dense
        profile = result.pop("profile", None)
        yield name, result
        if profile:
            yield f"profile, {name}", profile
        gc.collect()


def _model(bench: Bench, changes: tuple[str, ...], name: str) -> Result:
    host_keys = 256 if bench.cuda else 16
    model = [override.format(host_keys=host_keys) for override in MODELS[name]]
    before = 0
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    run = set_up(load_recipe(RECIPE, (*changes, *model)), bench.scratch / name, bench.device)
    result = measured(run, bench)
    planned = estimate(run.recipe, 1, run.recipe.model.vocab_size or 0, half=True).bytes.total
    result["planned_bytes"] = planned
    if bench.cuda:
        taken = torch.cuda.max_memory_allocated() - before
        result |= {"taken_bytes": taken, "ok": abs(planned - taken) <= 0.1 * taken}
    if name in PROFILED:
        result["profile"] = tried(partial(profiled, run, bench, name))
    return result


def _changes(bench: Bench) -> tuple[str, ...]:
    """Write random data, and return what to change in the recipe. A card with less memory takes a
    quarter of the tokens.
    """
    vocabulary, tokens = (32_768, 700_000) if bench.cuda else (300, 8000)
    changes: tuple[str, ...] = () if bench.cuda else SMALL
    if bench.cuda and torch.cuda.mem_get_info()[0] < _LARGE_MEMORY:
        changes = ("train.batch=4",)
    data = random_shards(bench.scratch / "random", vocabulary, tokens)
    return (f"data.path={data}", *changes)


def measured(run: Run, bench: Bench) -> Result:
    """Return seconds a step, tokens a second and MFU of some steps, as `memshard train` logs them,
    and the seconds of the first, which compiles.
    """
    begun = time.monotonic()
    train_step(run)
    bench.wait()
    first = time.monotonic() - begun
    for _ in range(_WARM - 1):
        train_step(run)
    bench.wait()
    meter = Meter(run, run.recipe, run.ranks)
    for _ in range(_TIMED):
        meter.add(train_step(run))
    bench.wait()
    values = meter.read(run.progress)
    names = ("step_s", "tokens_per_s", "mfu", "data_wait")
    return {"first_step_s": first} | {name: values[f"speed/{name}"] for name in names}


def profiled(run: Run, bench: Bench, name: str) -> Result:
    """Trace one step; return the device's busy seconds, launches, and the kernels that take most
    (on a CPU, operations: with those inside them). The trace goes to the results, for Perfetto.
    """
    step = run.progress.step + 1
    with StepProfiler(run.folder, 0, (step, step)) as profiler:
        profiler.begin(step)
        train_step(run)
        bench.wait()
        profiler.end(step)
    (trace,) = (run.folder / FOLDER).iterdir()
    text = trace.read_bytes()
    target = bench.out / f"step {name}.json.gz".replace(" ", "_")
    target.write_bytes(gzip.compress(text))
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(text)["traceEvents"]:
        if event.get("cat") == ("kernel" if bench.cuda else "cpu_op"):
            kernels[event["name"]].append(event["dur"] / 1e3)
    most = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:_KERNELS]
    return {
        "busy_ms": sum(map(sum, kernels.values())),
        "launches": sum(map(len, kernels.values())),
        "kernels": {
            kernel[:100]: {"ms": sum(times), "launches": len(times)} for kernel, times in most
        },
    }
