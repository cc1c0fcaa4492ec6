"""Runs of models with and without memory: what a model learns, and what a token costs."""

import fcntl
import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memshard.data_pipeline.format.index import INDEX_FILE
from memshard.models.memory.table import find_tables
from memshard.search.reproduce.clock import now
from memshard.search.reproduce.pkm_layers import BUILDERS
from memshard.trainer.config.load import dump, load_recipe
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.loop import evaluate_run, train
from memshard.trainer.precision import autocast, compute_dtype
from memshard.trainer.run import Run
from memshard.trainer.run_folder import CHECKPOINTS
from memshard.trainer.set_up import set_up
from memshard.trainer.step import train_step

RUNS = Path("runs/reproduce/pkm/runs")
_RESULT = "result.json"


def run_point(point: dict[str, Any]) -> dict[str, Any]:
    """A point with "clock" is a comparison of speed, any other a training run.

    FileNotFoundError, with the command that builds it, without the data.
    """
    return time_models(point) if "clock" in point else learn(point)


def learn(point: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate a model, as a run of the trainer that resumes. Experiments that share it run it once.

    point: recipe, a bundled name, with overrides; builder, one of BUILDERS. Of usage and KL the mean over the tables.
    """
    text = dump(load_recipe(point["recipe"], point["overrides"])) + point["builder"]
    folder = RUNS / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / _RESULT
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            run = _set_up(point, folder)
            if not train(run)["finished"]:
                raise RuntimeError(f"stopped at step {run.progress.step} of {run.recipe.train.steps}: the same command goes on from there")
            kept.write_text(json.dumps(_measured(run)))
            shutil.rmtree(folder / CHECKPOINTS)
        result: dict[str, Any] = json.loads(kept.read_text())
        return result


def _measured(run: Run) -> dict[str, Any]:
    evaluation = evaluate_run(run)
    usage = [asdict(report) for report in evaluation.usage.values()]
    mean = {key: sum(report[key] for report in usage) / len(usage) for key in ("usage", "kl_weighted", "kl_count") if usage}
    return {
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "dense": sum(p.numel() for p in run.model.parameters()),
        "table": sum(table.weight.numel() for _, table in find_tables(run.model)),
        **mean,
    }


def time_models(point: dict[str, Any]) -> dict[str, Any]:
    """Microseconds a token of training steps and of inference, of all models in turn: kind -> model -> one number a round.

    point: models, each as a point of `learn`; clock, the number of rounds; trained, which of them also make training steps. The models
    are fresh ones, whose reads are spread over the whole table: no row is in a cache because it is popular. Inference is a forward pass
    over a training micro-batch, in the precision of `memshard eval`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        runs = {label: _set_up(model, Path(scratch, str(number))) for number, (label, model) in enumerate(point["models"].items())}
        spent: dict[str, dict[str, list[float]]] = {"training": {label: [] for label in point["trained"]}, "inference": {}}
        for turn in range(point["clock"] + 1):
            for label, run in runs.items():
                if label in point["trained"]:
                    begun = now(run.device)
                    train_step(run)
                    tokens = run.recipe.train.batch * run.recipe.data.length
                    if turn:  # the first one builds kernels and allocates
                        spent["training"][label].append((now(run.device) - begun) / tokens * 1e6)
                seconds = _inference(run)
                if turn:
                    spent["inference"].setdefault(label, []).append(seconds * 1e6)
    return spent


@torch.inference_mode()
def _inference(run: Run) -> float:
    """Seconds a token."""
    rows = run.recipe.train.micro_batch or run.recipe.train.batch
    tokens = run.held_out.batch(0, min(rows, run.held_out.windows)).inputs.to(run.device)
    model = run.model.eval()
    with autocast(compute_dtype("auto", run.device), run.device):
        begun = now(run.device)
        model(tokens)
        return (now(run.device) - begun) / tokens.numel()


def _set_up(model: dict[str, Any], folder: Path) -> Run:
    recipe: Recipe = load_recipe(model["recipe"], model["overrides"])
    if not Path(recipe.data.path, INDEX_FILE).exists():
        build = f"memshard data build TEXT --vocab 4096 --held-out 0.005 --out {recipe.data.path}"
        raise FileNotFoundError(f"there is no data folder {recipe.data.path}: {build}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return set_up(recipe, folder, device, BUILDERS[model["builder"]])
