"""Runs of one model on the same text in different arrangements."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from memshard.data_pipeline.format.index import (
    HELD_OUT,
    INDEX_FILE,
    TRAIN,
    Split,
    dump_index,
    load_index,
)
from memshard.data_pipeline.format.shards import ShardWriter
from memshard.data_pipeline.stream.reader import SplitReader
from memshard.experiments.common.training_runs import run_folder, set_up_run, train_to_end
from memshard.experiments.data.arrangements import (
    ARRANGEMENTS,
    open_arranged,
    repeats,
    token_shares,
)
from memshard.io import atomic_write
from memshard.lock import holding
from memshard.trainer.config.load import load_recipe
from memshard.trainer.run import Run
from memshard.trainer.run_folder import CHECKPOINTS, METRICS_FILE
from memshard.trainer.watch.metrics import read_metrics

RUNS = Path("runs/reproduce/data")
_RESULT = "result.json"


def run_point(point: dict[str, Any]) -> dict[str, Any]:
    """Run a point: one with "probe" looks at the streams, any other is a training run.

    point: recipe, a bundled name, with overrides; cut: steps an epoch, of a part of the text, or
    None; arrangement; build, the arguments that build the data. FileNotFoundError, with the command
    that does, where there is none.
    """
    recipe = load_recipe(point["recipe"], point["overrides"])
    data, train = recipe.data, recipe.train
    path = data.path
    if point["cut"]:
        path = str(cut_corpus(path, point["cut"] * train.batch * data.length))
    if "probe" not in point:
        return learn({**point, "overrides": [*point["overrides"], f"data.path={path}"]})
    shares, settings = token_shares(path), (path, data.length, train.batch, train.seed, train.steps)
    streams = {name: open_arranged(*settings, name) for name in ARRANGEMENTS}
    return {
        "documents": load_index(path).splits[TRAIN].documents,
        "tokens": load_index(path).splits[TRAIN].tokens,
        "arrangements": {
            name: repeats(stream, train.steps, train.batch, shares)
            for name, stream in streams.items()
        },
    }


def learn(point: dict[str, Any]) -> dict[str, Any]:
    """Train with the trainer, which can resume, and return the held-out loss along the way."""
    arrangement = point["arrangement"]
    model = {"recipe": point["recipe"], "overrides": point["overrides"], "builder": arrangement}
    folder = run_folder(model, RUNS / "runs")
    kept = folder / _RESULT
    with holding(folder, "wait", wait=True):
        if not kept.exists():
            run = set_up_run(model, folder, point["build"])
            data, train = run.recipe.data, run.recipe.train
            run.stream = open_arranged(
                data.path, data.length, train.batch, train.seed, train.steps, arrangement
            )
            train_to_end(run)
            with atomic_write(kept) as file:
                file.write_text(json.dumps(_measured(run)), encoding="utf-8")
            shutil.rmtree(folder / CHECKPOINTS)
        result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return result


def _measured(run: Run) -> dict[str, Any]:
    lines = list(read_metrics(run.folder / METRICS_FILE))
    curve = [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line]
    training = [line["train/loss"] for line in lines if "train/loss" in line]
    steps, batch = run.recipe.train.steps, run.recipe.train.batch
    return {
        "loss": curve[-1][1],
        "curve": curve,
        # Of the last sixth, as single batches differ much.
        "training": float(np.mean(training[-max(len(training) // 6, 1) :])),
        "epochs": steps * batch / run.stream.samples_per_epoch,
        **_updates(run),
    }


def _updates(run: Run) -> dict[str, float]:
    """Return Adam's last update of embedding rows over the rate, |m| / sqrt(v), for tokens of which
    a step has less than one in two on average, and for the others. Gradients that agree from step
    to step give 1, and those of chance about sqrt((1 - beta1) / (1 + beta1)).
    """
    state, (beta1, beta2) = run.learned(), run.recipe.optimizer.betas
    name = "embedding.weight"
    step = run.progress.step
    first = state[f"exp_avg.{name}"].float() / (1 - beta1**step)
    second = state[f"exp_avg_sq.{name}"].float() / (1 - beta2**step)
    ratio = (first.abs() / (second.sqrt() + run.recipe.optimizer.eps)).mean(1).cpu().numpy()
    shares = token_shares(run.recipe.data.path)
    present = np.flatnonzero(shares)
    seldom = shares[present] * run.recipe.train.batch * run.recipe.data.length < 0.5
    return {
        f"update_{kind}": float(ratio[present[chosen]].mean()) if chosen.any() else float("nan")
        for kind, chosen in (("rare", seldom), ("frequent", ~seldom))
    }


def cut_corpus(source: str, tokens: int) -> Path:
    """Return a data folder with about so many training tokens of another, documents at equal
    distances, and its held-out text; it is made where there is none.
    """
    index = load_index(source)
    out = RUNS / "cut" / f"{index.fingerprint[:16]}-{tokens}"
    with holding(out, "wait", wait=True):
        if (out / INDEX_FILE).exists():
            return out
        reader, held_out = SplitReader(source, TRAIN), index.splits[HELD_OUT]
        stride = max(index.splits[TRAIN].tokens // tokens, 1)
        with ShardWriter(out, "train-00000", index.dtype) as writer:
            for document in range(0, len(reader.lengths), stride):
                size = int(reader.lengths[document])
                numbers, nothing, sizes = (np.array([number]) for number in (document, 0, size))
                writer.add(reader.read_parts(numbers, nothing, sizes, sizes)[0])
            shard = writer.finish()
        names = [name for part in held_out.shards for name in (part.file, part.sidecar)]
        for name in (index.tokenizer, *names):
            shutil.copy(Path(source, name), out / name)
        train = Split(shard.documents, shard.tokens, 0, 0, (shard,))
        with atomic_write(out / INDEX_FILE) as file:
            cut = replace(index, splits={TRAIN: train, HELD_OUT: held_out})
            file.write_text(dump_index(cut), encoding="utf-8")
    return out
