"""One optimizer step."""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from memshard.models.recompute.reversible import Grid
from memshard.trainer.guards import agree, gradients_finite, is_spike
from memshard.trainer.optim.dense.schedule import learning_rate
from memshard.trainer.optim.rows.revive import revive
from memshard.trainer.precision import autocast
from memshard.trainer.run import Run
from memshard.trainer.stop_signal import StopSignal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutcome:
    """loss: the batch's mean loss, of all ranks. norm: of the dense gradient. rate: learning rate,
    0 if the step was skipped. data_wait: seconds spent on reading. stopping: whether any rank
    was told to stop. spiked: whether the loss stands out. rewind: whether to go back to a
    checkpoint. tokens: read, over all ranks, padding of pairs not counted.
    """

    loss: float
    norm: float
    rate: float
    data_wait: float
    stopping: bool
    spiked: bool
    rewind: bool
    tokens: int


def train_step(run: Run, stop: StopSignal | None = None) -> StepOutcome:
    """Train on the next batch, or skip the update on all ranks: if any rank's gradient is not
    finite, if reversible streams left their grid (which gets coarser), or for a loss spike.

    stop: asked at the end, so that a signal during the step stops after it. RuntimeError if too
    many steps in a row were skipped.
    """
    guards, progress, scale, grid = (
        run.recipe.guards,
        run.progress,
        run.loss_scale.value,
        run.model.grid,
    )
    if not run.model.training:
        run.model.train()
    if grid is not None:
        grid.clear()
    run.phase = "reading data"
    begun = time.perf_counter()
    batches = run.next_batches()
    data_wait = time.perf_counter() - begun

    run.phase = "forward and backward"
    tokens, read = (
        run.task.predicted(run.stream, progress.batch, batches),
        run.stream.predicted(progress.batch),
    )
    for memory, use in run.watched:
        # A mean over the batch's tokens and over heads and halves, scaled like the loss beside it.
        # Where several ranks search for the same tokens, the factor of their table's gradient says
        # how many.
        use.balance = (
            run.recipe.train.key_balance
            * scale
            / (tokens * 2 * memory.heads * memory.values.gradient_scale)
        )
    total = torch.zeros((), device=run.device)
    for number, batch in enumerate(batches, 1):
        with run.engine.forward_context(last=number == len(batches)):
            with autocast(run.dtype, run.device):
                loss = run.task.loss(run.engine.model, batch, progress.step, run.carried) / tokens
            run.engine.backward(loss, scale)
        total += loss.detach()

    norm = run.engine.gradient_norm(scale)
    finite = gradients_finite(norm, run.rows.tables if run.rows else ())
    left_range = grid is not None and grid.left_range().any()
    run.phase = "agreeing on a verdict"
    # Ranks that share the dense matrices all have the loss of their tokens.
    share = total / run.recipe.parallel.tensor
    batch_loss, (infinite, out_of_range, stopping) = agree(
        share, ~finite, left_range, stop is not None and stop.received
    )
    broken = infinite or out_of_range
    # All ranks have the same loss and history, and so the same opinion.
    spiked = (
        not broken
        and len(progress.losses) == guards.window
        and is_spike(batch_loss, progress.losses, guards.threshold)
    )
    run.phase = "updating"
    rate = 0.0
    if broken or (spiked and guards.loss_spike != "warn"):
        _skip(run)
    else:
        rate = _update(run, norm, scale)
        progress.losses = [*progress.losses, batch_loss][-guards.window :]
    progress.step += 1
    progress.spikes += spiked
    if grid is not None and out_of_range:
        # Gradients of rebuilt streams mean nothing then, and so nothing for the loss scale.
        _coarsen(grid, progress.step)
    else:
        run.loss_scale.update(infinite)
    hopeless = _hopeless(run, infinite and not out_of_range)
    rewind = guards.loss_spike == "rewind" and (spiked or bool(hopeless))
    if hopeless and not rewind:
        advice = (
            "begin another run (init_from) at an earlier checkpoint, with a lower "
            "optimizer.lr or tables.lr"
        )
        raise RuntimeError(f"{hopeless} (norm {float(norm)}, loss {batch_loss}): {advice}")
    every = run.recipe.parallel.checksum_every
    if every and progress.step % every == 0:
        run.check_copies()
    return StepOutcome(batch_loss, float(norm), rate, data_wait, stopping, spiked, rewind, read)


def _update(run: Run, norm: Tensor, scale: float) -> float:
    settings = run.recipe.train
    rate = learning_rate(run.recipe.optimizer, run.progress.step, settings.steps)
    run.engine.step(rate, norm, settings.clip, scale)
    if run.rows is not None:
        run.rows.unscale(scale)
        run.rows.step()
    for query_norm in run.query_norms:
        query_norm.commit()
    if run.carried is not None:
        run.carried.commit()
    if run.rows is not None:
        for memory, use in run.watched:
            use.commit(run.rows.state[memory.values.anchor]["step"])
        if run.recipe.tables.revive:
            revive(
                (memory for memory, _ in run.watched),
                run.rows,
                run.recipe.tables.dead_after,
                run.recipe.train.seed,
            )
    run.progress.in_a_row = 0
    return rate


def _skip(run: Run) -> None:
    run.engine.clear()
    if run.rows is not None:
        run.rows.zero_grad()
    for query_norm in run.query_norms:
        query_norm.discard()
    if run.carried is not None:
        run.carried.discard()
    for _, use in run.watched:
        use.discard()
    run.progress.skipped += 1
    run.progress.in_a_row += 1


def _coarsen(grid: Grid, step: int) -> None:
    for (layer, largest), left in zip(
        grid.largest.items(), grid.left_range().tolist(), strict=True
    ):
        if left:
            log.warning(
                "step %d: a stream of block %d reached %g and the grid ends at %g",
                step,
                layer,
                largest,
                grid.limit,
            )
    grid.coarsen()
    log.warning("step %d is left out: streams left the grid; it ends at %g now", step, grid.limit)


def _hopeless(run: Run, overflow: bool) -> str | None:
    """Why the run cannot go on, if it cannot."""
    scale, progress = run.loss_scale, run.progress
    if scale.exhausted:
        return (
            f"the loss scale fell to {scale.value:g}, below train.loss_scale.minimum, and the "
            "gradient is still not finite"
        )
    # Overflows that lower the loss scale are not yet failures.
    if progress.in_a_row > run.recipe.train.max_skipped and not (overflow and scale.dynamic):
        reasons = "a gradient that is not finite, a loss spike or streams beyond their grid"
        return f"{progress.in_a_row} steps in a row, up to step {progress.step}, had {reasons}"
    return None
