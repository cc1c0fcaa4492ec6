"""The training loop."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from statistics import median
from time import perf_counter
from typing import Any

from memshard.data_pipeline.stream.reader import DamagedData
from memshard.parallel.collectives import set_timeout
from memshard.trainer.evaluation.perplexity import Evaluation, evaluate
from memshard.trainer.outage import NO_DATA, NoData
from memshard.trainer.resume import rewind, save
from memshard.trainer.run import Run
from memshard.trainer.step import RunStep, train_step
from memshard.trainer.stop_signal import StopSignal
from memshard.trainer.watch.lost_ranks import NCCL_GRACE
from memshard.trainer.watch.meter import Meter
from memshard.trainer.watch.metrics import Metrics
from memshard.trainer.watch.profile import StepProfiler

log = logging.getLogger(__name__)

_LAST_SECONDS = 20.0
"""How long a run that ends by an error waits for the checkpoint that is being written."""


def train(run: Run, stop_at: int | None = None, stop: StopSignal | None = None) -> dict[str, Any]:
    """Train to the recipe's last step, to `stop_at` or until told to stop, and save the last step.

    stop: a StopSignal that already listens; by default the loop listens. Returns the result, whose
    `finished` says whether the recipe's last step was reached, and `outage`, if there was one, why
    data could not be read, at which all ranks stop. DamagedData if more are damaged than is
    tolerated, once all is saved; RuntimeError if too many steps in a row were skipped.
    """
    if not isinstance(run, Run):
        raise TypeError(
            f"train takes the run that set_up returns, not {type(run).__name__}; a model of your "
            "own trains in your own loop, with build_for_training and training_step"
        )
    settings, guards = run.recipe.train, run.recipe.guards
    last = min(settings.steps, stop_at or settings.steps)
    metrics = _metrics(run)
    meter = Meter(run, run.recipe, run.ranks)
    profiled = StepProfiler(run.folder, run.rank, settings.profile)
    if guards.loss_spike == "rewind":
        save(run)  # something to go back to
    evaluation: Evaluation | None = None
    no_data: NoData | None = None
    try:
        with nullcontext(stop) if stop else StopSignal() as stop, profiled as profiler:
            stopping = save_owed = False
            while run.progress.step < last and not stopping:
                profiler.begin(run.progress.step + 1)
                try:
                    outcome = train_step(run, stop)
                except NO_DATA as error:
                    # Before anything of the step was computed: it is the next one of a resume.
                    no_data = error
                    break
                profiler.end(run.progress.step)
                _set_step_timeout(run)  # the first step connects and compiles, which takes longer
                meter.add(outcome)
                stopping = outcome.stopping
                if outcome.spiked:
                    metrics.say(_spike_line(run, outcome))
                if outcome.rewind:
                    with _long_timeout(run):
                        rewind(run)
                    # A new Metrics drops the lines of the steps that are trained again,
                    # as after a resume.
                    metrics.close()
                    metrics = _metrics(run)
                    metrics.say(
                        f"back to step {run.progress.step}, rewind {run.progress.rewinds} of "
                        f"{guards.rewinds}"
                    )
                    meter.restart()
                    continue
                step = run.progress.step
                metrics.advance()
                if step % settings.log_every == 0 or step == last or stopping:
                    values = meter.read(run.progress)
                    # A save in the background ends some steps later: its time goes
                    # to the next line.
                    if run.saving.seconds is not None:
                        values["speed/save_total_s"], run.saving.seconds = run.saving.seconds, None
                    log.info("%s", meter.rank_report)
                    metrics.write(step, values)
                    if not metrics.shows_bar:
                        metrics.say(_line(step, settings.steps, values))
                if step == settings.steps or (
                    settings.eval_every and step % settings.eval_every == 0
                ):
                    try:
                        with meter.paused(), _long_timeout(run):
                            evaluation = evaluate_run(run)
                    except NO_DATA as error:
                        no_data = error
                        break
                    metrics.write(step, evaluation_values(evaluation))
                    metrics.say(_evaluation_line(step, evaluation))
                save_owed |= step % settings.save_every == 0 or outcome.save_due
                # Not while steps are skipped: what makes gradients infinite may be in the weights,
                # and checkpoints of them would push the good ones out.
                if save_owed and not run.progress.in_a_row:
                    save_owed = False
                    begun = perf_counter()
                    with meter.paused(), _long_timeout(run):
                        # Returns once tables are written and all else is copied; the copies are
                        # written while the next steps run.
                        save(run, wait=False)
                    metrics.write(step, {"speed/save_s": perf_counter() - begun})
            if no_data is not None:
                log.warning("stopping, as data cannot be read: %s", no_data)
            run.stop_reading()  # a reader that is killed now must not end the last save
            with _long_timeout(run):
                # A save of this step may still be under way: this waits for it, and
                # writes none twice.
                checkpoint = save(run)
            if isinstance(no_data, DamagedData):
                raise no_data
    except Exception:
        run.saving.finish_within(_LAST_SECONDS)
        raise
    finally:
        run.stop_reading()
        metrics.close()
    progress = run.progress
    result: dict[str, Any] = {
        "step": progress.step,
        "skipped": progress.skipped,
        "checkpoint": str(checkpoint),
    }
    if evaluation is not None:
        result |= {"loss": evaluation.loss, "perplexity": evaluation.perplexity}
        result["usage"] = {name: asdict(report) for name, report in evaluation.usage.items()}
    finished = progress.step >= settings.steps and no_data is None
    if no_data is not None:
        result["outage"] = str(no_data)
    run.phase = "done" if finished else "stopped"
    return result | {"finished": finished}


def _metrics(run: Run) -> Metrics:
    return Metrics(
        run.folder, run.recipe, run.progress.step, enabled=run.rank == 0, owned=run.owns_folder
    )


@contextmanager
def _long_timeout(run: Run) -> Iterator[None]:
    """Let collectives wait long during an evaluation or save, when a rank may be busy alone."""
    # Not undone after an error: the run then ends.
    set_timeout(run.recipe.guards.first_timeout + _grace(run))
    yield
    _set_step_timeout(run)


def _set_step_timeout(run: Run) -> None:
    """Let collectives wait guards.timeout, except those of a save in the background."""
    set_timeout(run.recipe.guards.timeout + _grace(run), but=run.saving.group)


def _grace(run: Run) -> float:
    """Return by how much NCCL, which aborts the process, waits longer than we do."""
    return NCCL_GRACE if run.device.type == "cuda" else 0.0


def evaluate_run(run: Run) -> Evaluation:
    """Evaluate on the held-out text, as many rows at a time as in a training micro-batch; as one
    continuous text where training carries states.
    """
    run.phase = "evaluating"
    if run.carried_states is not None:
        return evaluate(run.model, run.task, run.held_out, 1, run.dtype, carry=True)
    rows = run.recipe.train.micro_batch or -(-run.recipe.train.batch // run.data_ranks)
    return evaluate(
        run.model, run.task, run.held_out, rows, run.dtype, run.data_rank, run.data_ranks
    )


def evaluation_values(evaluation: Evaluation) -> dict[str, float]:
    """Return an evaluation as numbers by metric name."""
    values = {"eval/loss": evaluation.loss, "eval/perplexity": evaluation.perplexity}
    for name, report in evaluation.usage.items():
        values |= {f"{name}/{key}": value for key, value in asdict(report).items()}
    return values


def _spike_line(run: Run, outcome: RunStep) -> str:
    done = {"warn": "trained on all the same", "skip": "not trained on", "rewind": "going back"}[
        run.recipe.guards.loss_spike
    ]
    return (
        f"step {run.progress.step}: loss {outcome.loss:.4f} against a median of "
        f"{median(run.progress.losses):.4f}: {done}"
    )


def _line(step: int, steps: int, values: dict[str, float]) -> str:
    return (
        f"step {step}/{steps}  loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}  norm "
        f"{values['train/grad_norm']:.2f}  "
        f"{values['speed/tokens_per_s']:,.0f} tokens/s  mfu {values['speed/mfu']:.0%}  data "
        f"{values['speed/data_wait']:.1%}"
        + (f"  damaged {values['train/masked']:.1%}" if values["train/masked"] else "")
    )


def _evaluation_line(step: int, evaluation: Evaluation) -> str:
    text = (
        f"step {step}  held-out loss {evaluation.loss:.4f}  perplexity {evaluation.perplexity:.2f}"
    )
    for name, report in evaluation.usage.items():
        text += (
            f"\n  {name}: usage {report.usage:.1%}, KL {report.kl_weighted:.2f} weighted, "
            f"{report.kl_count:.2f} by count"
        )
    return text
