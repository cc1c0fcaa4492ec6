"""One optimizer step."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from memshard.trainer.guards import StopSignal, agree, gradients_finite
from memshard.trainer.precision import autocast
from memshard.trainer.run import Run


@dataclass(frozen=True)
class StepOutcome:
    """loss: this rank's share of the batch's mean loss. norm: of the dense gradient. rate: learning rate, 0 if the step was
    skipped. data_wait: seconds spent on reading. stopping: whether any rank was told to stop.
    """

    loss: Tensor
    norm: float
    rate: float
    data_wait: float
    stopping: bool


def train_step(run: Run, stop: StopSignal | None = None) -> StepOutcome:
    """Train on the next batch, or skip the update on all ranks if any rank's gradient is not finite.

    stop: asked at the end, so that a signal during the step stops after it. RuntimeError if too many steps in a row were skipped.
    """
    settings, progress = run.recipe.train, run.progress
    run.model.train()
    begun = time.perf_counter()
    batches = run.next_batches()
    data_wait = time.perf_counter() - begun

    tokens = run.stream.predicted(progress.step)
    total = torch.zeros((), device=run.device)
    for number, batch in enumerate(batches, 1):
        with run.engine.forward_context(last=number == len(batches)):
            with autocast(run.dtype, run.device):
                loss = run.task.loss(run.engine.model, batch, progress.step) / tokens
            run.engine.backward(loss)
        total += loss.detach()

    norm = run.engine.gradient_norm()
    finite = gradients_finite(norm, run.rows.tables if run.rows else ())
    broken, stopping = agree(not finite, stop is not None and stop.received, device=run.device)
    rate = 0.0 if broken else _update(run, norm)
    if broken:
        _skip(run)
    progress.step += 1
    if progress.in_a_row > settings.max_skipped:
        raise RuntimeError(
            f"{progress.in_a_row} steps in a row, up to step {progress.step}, had a gradient that is not finite (norm {float(norm)}): "
            "lower optimizer.lr or tables.lr, or resume an earlier checkpoint"
        )
    return StepOutcome(total, float(norm), rate, data_wait, stopping)


def _update(run: Run, norm: Tensor) -> float:
    settings = run.recipe.train
    rate = run.engine.step(run.progress.step, settings.steps, norm, settings.clip)
    if run.rows is not None:
        run.rows.step()
    for query_norm in run.query_norms:
        query_norm.commit()
    run.progress.in_a_row = 0
    return rate


def _skip(run: Run) -> None:
    run.engine.clear()
    if run.rows is not None:
        run.rows.zero_grad()
    for query_norm in run.query_norms:
        query_norm.discard()
    run.progress.skipped += 1
    run.progress.in_a_row += 1
