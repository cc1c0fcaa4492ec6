"""Runs of models with and without memory: how well a model learns, and how long a token takes."""

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memshard.experiments.common.clock import now
from memshard.experiments.common.training_runs import run_folder, set_up_run, train_to_end
from memshard.experiments.pkm.layers import BUILDERS
from memshard.io import atomic_write
from memshard.lock import holding
from memshard.models.memory.table import find_tables
from memshard.trainer.loop import evaluate_run
from memshard.trainer.precision import autocast, compute_dtype
from memshard.trainer.run import Run
from memshard.trainer.run_folder import CHECKPOINTS
from memshard.trainer.step import train_step

RUNS = Path("runs/reproduce/pkm/runs")
_RESULT = "result.json"


def run_point(point: dict[str, Any]) -> dict[str, Any]:
    """Run a point: one with "clock" compares speeds, any other is a training run.

    FileNotFoundError, with the command that builds the data, where there is none.
    """
    return time_models(point) if "clock" in point else learn(point)


def learn(point: dict[str, Any]) -> dict[str, Any]:
    """Train a model with the trainer, which can resume, and return its evaluation.

    Experiments that share a model train it once. point: recipe, a bundled name, with overrides;
    builder, one of BUILDERS. Usage and KL are means over the tables.
    """
    folder = run_folder(point, RUNS)
    kept = folder / _RESULT
    # Another study may train the same model at this moment: wait for it and take its result.
    with holding(folder, "wait", wait=True):
        if not kept.exists():
            run = _set_up(point, folder)
            train_to_end(run)
            with atomic_write(kept, durable=True) as file:
                file.write_text(json.dumps(_measured(run)), encoding="utf-8")
            # Only now is the result on disk; checkpoints of all studies together would take
            # tens of GB.
            shutil.rmtree(folder / CHECKPOINTS)
        result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return result


def _measured(run: Run) -> dict[str, Any]:
    evaluation, settings = evaluate_run(run), run.recipe
    # A memory's other tables are read at the same slots, without weights.
    usage = [asdict(report) for name, report in evaluation.usage.items() if name.endswith("values")]
    kinds = ("usage", "kl_weighted", "kl_count", "reads_per_slot") if usage else ()
    mean = {kind: sum(report[kind] for report in usage) / len(usage) for kind in kinds}
    return {
        "loss": evaluation.loss,
        "tokens": evaluation.tokens,
        "trained_tokens": settings.train.steps * settings.train.batch * settings.data.length,
        "lr": settings.optimizer.lr,
        "table_lr": settings.tables.lr,
        "perplexity": evaluation.perplexity,
        "dense": sum(p.numel() for p in run.model.parameters()),
        "table": sum(table.weight.numel() for _, table in find_tables(run.model)),
        **mean,
    }


def time_models(point: dict[str, Any]) -> dict[str, Any]:
    """Time training steps and inference of all models in turn: return kind -> model ->
    microseconds a token, a number a round.

    point: models, each as a point of `learn`; clock, the number of rounds; trained, which of them
    also make training steps. As many rounds go before and do not count: the first builds kernels,
    and with seven models the allocator took eight to settle (370 us a token, then 255). The models
    are untrained, so that their reads are spread over the whole table: no row is in a cache because
    it is popular. Inference is a forward pass over a training micro-batch, in the precision of
    `memshard eval`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            label: _set_up(model, Path(scratch, str(number)))
            for number, (label, model) in enumerate(point["models"].items())
        }
        spent: dict[str, dict[str, list[float]]] = {
            "training": {label: [] for label in point["trained"]},
            "inference": {},
        }
        for turn in range(-point["clock"], point["clock"]):
            for label, run in runs.items():
                if label in point["trained"]:
                    begun = now(run.device)
                    train_step(run)
                    tokens = run.recipe.train.batch * run.recipe.data.length
                    if turn >= 0:
                        spent["training"][label].append((now(run.device) - begun) / tokens * 1e6)
                seconds = _inference(run)
                if turn >= 0:
                    spent["inference"].setdefault(label, []).append(seconds * 1e6)
    return spent


@torch.inference_mode()
def _inference(run: Run) -> float:
    """Return the seconds a token takes in a forward pass."""
    rows = run.recipe.train.micro_batch or run.recipe.train.batch
    tokens = run.held_out.batch(0, min(rows, run.held_out.windows)).inputs.to(run.device)
    model = run.model.eval()
    with autocast(compute_dtype("auto", run.device), run.device):
        begun = now(run.device)
        model(tokens)
        return (now(run.device) - begun) / tokens.numel()


def _set_up(model: dict[str, Any], folder: Path) -> Run:
    return set_up_run(
        model, folder, "TEXT --vocab 4096 --held-out 0.005", BUILDERS[model["builder"]]
    )
