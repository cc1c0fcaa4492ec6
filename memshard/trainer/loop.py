"""The training loop."""

import time
from dataclasses import asdict
from typing import Any

import torch

from memshard.data_pipeline.stream.share import rank_share
from memshard.models.memory.table import find_tables
from memshard.parallel.collectives import all_sum
from memshard.trainer.estimate import flops_per_token
from memshard.trainer.evaluation.perplexity import Evaluation, evaluate
from memshard.trainer.guards import StopSignal, agree, gradients_finite
from memshard.trainer.metrics import Metrics
from memshard.trainer.peak import peak_flops
from memshard.trainer.precision import autocast
from memshard.trainer.run import Run


def train(run: Run, stop_at: int | None = None) -> dict[str, Any]:
    """Train to the recipe's last step, or to `stop_at`, or until told to stop; the last step is always saved.

    Returns the result, with `finished` telling whether the recipe's last step was reached. RuntimeError if too many steps
    in a row had a gradient that is not finite.
    """
    settings, progress = run.recipe.train, run.progress
    last = min(settings.steps, stop_at or settings.steps)
    metrics = Metrics(run.folder if run.rank == 0 else None, progress.step, settings.steps)
    meter = _Meter(run)
    evaluation: Evaluation | None = None
    try:
        with StopSignal() as stop:
            stopping = False
            while progress.step < last and not stopping:
                stopping = _train_step(run, meter, stop)
                step = progress.step
                metrics.advance()
                if step % settings.log_every == 0 or step == last:
                    values = meter.read()
                    metrics.write(step, values)
                    if not metrics.shows_bar:
                        metrics.say(_line(step, settings.steps, values))
                if step == settings.steps or (settings.eval_every and step % settings.eval_every == 0):
                    evaluation = evaluate_run(run)
                    metrics.write(step, evaluation_values(evaluation))
                    metrics.say(_evaluation_line(step, evaluation))
                    meter.restart()
                if step % settings.save_every == 0:
                    run.save()
                    meter.restart()
            checkpoint = run.save()
    finally:
        metrics.close()
    result: dict[str, Any] = {"step": progress.step, "skipped": progress.skipped, "checkpoint": str(checkpoint)}
    if evaluation is not None:
        result |= {"loss": evaluation.loss, "perplexity": evaluation.perplexity}
        result["usage"] = {name: asdict(report) for name, report in evaluation.usage.items()}
    return result | {"finished": progress.step == settings.steps}


def evaluate_run(run: Run) -> Evaluation:
    """Evaluate on the held-out text, with the rows of a training micro-batch at a time."""
    rows = run.recipe.train.micro_batch or -(-run.recipe.train.batch // run.ranks)
    return evaluate(run.model, run.task, run.held_out, rows, run.dtype, run.rank, run.ranks)


def evaluation_values(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation as named numbers."""
    values = {"eval/loss": evaluation.loss, "eval/perplexity": evaluation.perplexity}
    for name, report in evaluation.usage.items():
        values |= {f"{name}/{key}": value for key, value in asdict(report).items()}
    return values


def _train_step(run: Run, meter: "_Meter", stop: StopSignal) -> bool:
    """One optimizer step, or its skipping, decided once for all ranks; returns whether any rank was told to stop."""
    settings, progress = run.recipe.train, run.progress
    run.model.train()
    waited = time.perf_counter()
    batches = rank_share(run.stream, progress.step, settings.batch, run.rank, run.ranks, settings.micro_batch)
    meter.data_wait += time.perf_counter() - waited

    tokens = settings.batch * run.recipe.data.length
    for number, batch in enumerate(batches, 1):
        with run.engine.forward_context(last=number == len(batches)):
            with autocast(run.dtype, run.device):
                loss = run.task.loss(run.engine.model, batch, progress.step) / tokens
            run.engine.backward(loss)
        meter.loss += loss.detach()

    tables = run.rows.tables if run.rows else []
    norm = run.engine.gradient_norm()
    broken, stopping = agree(not gradients_finite(norm, tables), stop.received, device=run.device)
    if broken:
        run.engine.clear()
        for table in tables:
            table.drop_reads()
        for query_norm in run.query_norms:
            query_norm.discard()
        progress.skipped += 1
        progress.in_a_row += 1
    else:
        meter.rate = run.engine.step(progress.step, settings.steps, norm, settings.clip)
        if run.rows is not None:
            run.rows.step()
        for query_norm in run.query_norms:
            query_norm.commit()
        progress.in_a_row = 0
    meter.norm = float(norm)
    progress.step += 1
    meter.steps += 1
    if progress.in_a_row > settings.max_skipped:
        raise RuntimeError(
            f"{progress.in_a_row} steps in a row, up to step {progress.step}, had a gradient that is not finite (norm {float(norm)}): "
            "lower optimizer.lr or tables.lr, or resume an earlier checkpoint"
        )
    return stopping


class _Meter:
    """Sums what happens between two lines of metrics."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.flops = flops_per_token(run.recipe.model, run.recipe.data.length)
        self.peak = peak_flops(run.device, run.dtype) * run.ranks
        self.rate = self.norm = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin anew: at first, after reading, and after an evaluation or save, whose time is not training's."""
        self.loss = torch.zeros((), device=self.run.device)
        self.steps = 0
        self.data_wait = 0.0
        self.begun = time.perf_counter()

    def read(self) -> dict[str, float]:
        """The means since the last reading; all ranks call it."""
        seconds = time.perf_counter() - self.begun
        recipe, steps = self.run.recipe, max(self.steps, 1)
        tokens_per_s = steps * recipe.train.batch * recipe.data.length / seconds
        values = {
            "train/loss": float(all_sum(self.loss)) / steps,
            "train/lr": self.rate,
            "train/grad_norm": self.norm,
            "train/skipped": float(self.run.progress.skipped),
            "speed/tokens_per_s": tokens_per_s,
            "speed/step_s": seconds / steps,
            "speed/mfu": tokens_per_s * self.flops / self.peak,
            "speed/data_wait": self.data_wait / seconds,
        }
        if self.run.rows is not None:
            touched = all_sum(torch.tensor(self.run.rows.touched, dtype=torch.float64, device=self.run.device)).tolist()
            for (name, table), (reads, rows) in zip(find_tables(self.run.model), touched, strict=True):
                values |= {f"{name}/touched": rows / table.slots, f"{name}/duplicates": reads / max(rows, 1)}
        self.restart()
        return values


def _line(step: int, steps: int, values: dict[str, float]) -> str:
    return (
        f"step {step}/{steps}  loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}  norm {values['train/grad_norm']:.2f}  "
        f"{values['speed/tokens_per_s']:,.0f} tokens/s  mfu {values['speed/mfu']:.0%}  data {values['speed/data_wait']:.1%}"
    )


def _evaluation_line(step: int, evaluation: Evaluation) -> str:
    text = f"step {step}  held-out loss {evaluation.loss:.4f}  perplexity {evaluation.perplexity:.2f}"
    for name, report in evaluation.usage.items():
        text += f"\n  {name}: usage {report.usage:.1%}, KL {report.kl_weighted:.2f} weighted, {report.kl_count:.2f} by count"
    return text
