"""One step of a run: read a batch, train on it or leave it out, and record how it went."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memshard.data_pipeline.stream.batch import IGNORE, Batch
from memshard.parallel.collectives import all_sum, host_or
from memshard.parallel.mesh import tensor_size
from memshard.parallel.tables.sharded import equal_shares
from memshard.trainer.guards import is_spike
from memshard.trainer.optim.rows.revive import revive
from memshard.trainer.outage import NO_DATA, NoData, check_away, counted
from memshard.trainer.run import Run
from memshard.trainer.stop_signal import StopSignal
from memshard.trainer.tasks.language_model import LanguageModelTask
from memshard.trainer.training import StepOutcome, training_step

_EARLY_CHECKS = (1, 2, 10)
"""Steps after a start that end with a check of copies: what a setting does wrong, it does at once,
and a resume gives all ranks the same copy again.
"""


@dataclass(frozen=True, kw_only=True)
class RunStep(StepOutcome):
    """The outcome of a run's step; `loss` is the mean over the tokens of the batch.

    data_wait: seconds spent on reading. tokens: read over all ranks, padding of pairs not counted.
    masked: of these, not predicted because their document is damaged. spiked: whether the loss is
    a spike. rewind: whether to go back to a checkpoint.
    """

    data_wait: float
    tokens: int
    masked: int
    spiked: bool
    rewind: bool


def train_step(run: Run, stop: StopSignal | None = None) -> RunStep:
    """Train on the next batch, or skip the update on all ranks: if any rank's gradient is not
    finite, if reversible streams left their grid (which gets coarser), or for a loss spike.

    stop: read at the end, so that a signal during the step stops after it. RuntimeError if too many
    steps in a row were skipped; one of NO_DATA, on all ranks, if one of them cannot read its data.
    """
    guards, progress = run.recipe.guards, run.progress
    run.phase = "reading data"
    begun = time.perf_counter()
    away: NoData | None = None
    try:
        batches = run.next_batches()
    except NO_DATA as error:
        batches, away = [], error
    data_wait = time.perf_counter() - begun
    read = run.stream.tokens_read(progress.batch)
    # Of the whole batch: the losses of all ranks and micro-batches then add up to its mean.
    tokens, predicted, missing = _count_tokens(run, batches, away)
    _balance_keys(run, tokens)
    spiked = False

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return run.task.loss(model, batch, progress.step, run.carried_states) / tokens

    def accept(batch_loss: float) -> bool:
        # All ranks have the same loss and history, and so the same answer.
        nonlocal spiked
        spiked = len(progress.losses) == guards.window and is_spike(
            batch_loss, progress.losses, guards.threshold
        )
        # Judged before the update: a spike's gradients must not reach the weights.
        return not spiked or guards.loss_spike == "warn"

    tables = run.table_optimizer.tables if run.table_optimizer else ()
    # Passes have the same shape on all ranks, and only pairs are cut to their lengths.
    alike = not missing and isinstance(run.task, LanguageModelTask)
    with equal_shares(tables, alike):
        outcome = training_step(
            run, batches, loss, progress.step, accept, stop, run.saving.retry_due, run.read_ahead
        )
    if outcome.skipped:
        _left_out(run)
    else:
        _done(run)
        # A loss that was left out is not remembered, so several spikes in a row are all measured by
        # the losses before them.
        progress.losses = [*progress.losses, outcome.loss][-guards.window :]
    # Skipped or not: the data and the learning rate's schedule go on.
    progress.step += 1
    progress.spikes += spiked
    hopeless = _hopeless(run, outcome)
    rewind = guards.loss_spike == "rewind" and (spiked or bool(hopeless))
    if hopeless and not rewind:
        raise RuntimeError(
            f"{hopeless} (norm {outcome.norm}, loss {outcome.loss}): begin another run (init_from) "
            "at an earlier checkpoint, with a lower optimizer.lr or tables.lr"
        )
    # After the update, which is where copies drift apart.
    run.steps_here += 1
    every = run.recipe.parallel.checksum_every
    if run.steps_here in _EARLY_CHECKS or (every and progress.step % every == 0):
        run.check_copies()
    return RunStep(
        **vars(outcome),
        data_wait=data_wait,
        tokens=read,
        masked=read - predicted,
        spiked=spiked,
        rewind=rewind,
    )


def _count_tokens(run: Run, batches: list[Batch], away: NoData | None) -> tuple[int, int, int]:
    """Return, over all ranks, the tokens that have a loss, at least 1, those of the batch whose
    target is known (all that were read but the damaged ones), and those whose target is not.
    batches: the local ones. away: why there are none. Collective; an error on all ranks if a rank
    has none.
    """
    rows = []
    for batch in batches:
        known = batch.targets != IGNORE
        rows.append(torch.stack([run.task.loss_tokens(batch), known.sum(), (~known).sum()]))
    counts = torch.stack(rows).sum(0) if rows else torch.zeros(3, dtype=torch.int64)
    counts = torch.cat([counts, counts.new_tensor(counted(away))])
    if run.ranks > 1:
        counts = all_sum(counts.to(host_or(run.device)))
    losses, known, missing, *ranks_away = counts.tolist()
    check_away(away, *ranks_away)
    # Tensor-parallel ranks read the same rows, which are counted once. With all of a batch damaged,
    # the sum of no losses is 0 and so is their mean.
    same = tensor_size(run.mesh)
    return max(losses // same, 1), known // same, missing // same


def _balance_keys(run: Run, tokens: float) -> None:
    """Set the weight of the loss that evens out which sub-keys are read, if the recipe has one.

    It is a mean over the batch's tokens and over heads and halves, scaled like the loss that it is
    added to. Where several ranks search for the same tokens, the table's
    gradient_scale says how many.
    """
    for memory, use in run.watched:
        use.balance = (
            run.recipe.train.key_balance
            * run.loss_scale.value
            / (tokens * 2 * memory.heads * memory.values.gradient_scale)
        )


def _done(run: Run) -> None:
    """Let carried states and key use count the step, and revive dead rows when it is time."""
    if run.carried_states is not None:
        run.carried_states.commit()
    rows, tables = run.table_optimizer, run.recipe.tables
    if rows is not None:
        for memory, use in run.watched:
            # The table's own count, by which `revive` tells who is dead; skipped steps are
            # not in it.
            use.commit(rows.state[memory.values.anchor]["step"])
        if tables.revive:
            memories = (memory for memory, _ in run.watched)
            revive(memories, rows, tables.dead_after, run.recipe.train.seed)
    run.progress.in_a_row = 0


def _left_out(run: Run) -> None:
    """Let carried states and key use forget the step."""
    if run.carried_states is not None:
        run.carried_states.discard()
    for _, use in run.watched:
        use.discard()
    run.progress.skipped += 1
    run.progress.in_a_row += 1


def _hopeless(run: Run, outcome: StepOutcome) -> str | None:
    """Return why the run cannot go on, None if it can."""
    scale, progress = run.loss_scale, run.progress
    if scale.exhausted:
        return (
            f"the loss scale fell to {scale.value:g}, below train.loss_scale.minimum, and the "
            "gradient is still not finite"
        )
    # An overflow that lowers the loss scale is not a failure yet.
    adapting = outcome.overflow and not outcome.left_grid and scale.dynamic
    if progress.in_a_row > run.recipe.train.max_skipped and not adapting:
        reasons = "a gradient that is not finite, a loss spike or streams beyond their grid"
        return f"{progress.in_a_row} steps in a row, up to step {progress.step}, had {reasons}"
    return None
