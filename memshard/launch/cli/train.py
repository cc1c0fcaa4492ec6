"""`memshard train`: train a recipe, or resume its run."""

import argparse
import logging
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.data_pipeline.fetch import Allowed, Unreachable
from memshard.io import check_folder
from memshard.launch.cli.cost_text import describe_ranks, describe_tables
from memshard.launch.cli.outcome import Stopped, usage_errors
from memshard.launch.cli.parser import Subparsers, add_allow
from memshard.launch.cli.streams import show
from memshard.launch.orphans import stop_without_parent
from memshard.launch.ranks import read_ranks
from memshard.trainer.stop_signal import PREEMPTED, StopSignal

if TYPE_CHECKING:
    from memshard.trainer.cost.estimate import Estimate
    from memshard.trainer.run import Run
    from memshard.trainer.watch.heartbeat import Heartbeat, Phase

log = logging.getLogger(__name__)


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("train", help="train or resume")
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a YAML file, a bundled recipe (memshard config list shows them), or a run folder",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings that override the recipe's",
    )
    parser.add_argument(
        "--run",
        dest="folder",
        metavar="DIR",
        help="the run's folder (default runs/RECIPE); one that exists is resumed",
    )
    parser.add_argument(
        "--stop-at",
        type=int,
        metavar="STEP",
        help="save at this step and exit with code 75, to be resumed later",
    )
    add_allow(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train or resume. Stopped if the last step was not reached."""
    stop = StopSignal()
    # Before the long imports: a signal that comes early would end the process.
    stop.listen(PREEMPTED)
    with usage_errors():
        from memshard.trainer.config.load import load_recipe

        recipe = load_recipe(args.recipe, args.overrides, args.allow)
        folder = run_folder(args)
        if args.stop_at is not None and args.stop_at < 1:
            raise ValueError(f"--stop-at is {args.stop_at}; steps are counted from 1")
    from memshard.launch.env import joined_ranks
    from memshard.trainer.checkpoint.folders import committed
    from memshard.trainer.loop import train
    from memshard.trainer.run_folder import held_by_rank0
    from memshard.trainer.set_up import set_up
    from memshard.trainer.watch.heartbeat import Heartbeat
    from memshard.trainer.watch.lost_ranks import (
        describe_lost_ranks,
        end_if_ranks_are_lost,
        is_collective_error,
    )
    from memshard.trainer.watch.rank_log import rank_log

    with usage_errors():
        parent_waits = read_ranks(os.environ).parent_waits
    if parent_waits:
        stop_without_parent()
    # The longer timeout: the first steps compile kernels, at another pace on each rank.
    with joined_ranks(recipe.guards.first_timeout) as (device, ranks), ExitStack() as held:
        with usage_errors():
            lock = held.enter_context(held_by_rank0(folder))
            try:
                prepared = set_up(recipe, folder, device)
            except Unreachable as error:
                if not committed(folder / "checkpoints"):
                    raise  # perhaps a mistake in the address
                # As in the middle of a run: a line of jobs goes on with the next one.
                raise Stopped(
                    f"data cannot be read ({error}); the same command resumes the run"
                ) from error
        prepared.lock = lock
        if prepared.ranks > 1:
            # torchrun sends SIGTERM to the other ranks when the first one ends.
            stop.ignore_on_exit = True
        rank = prepared.rank
        # A function, not values: a thread reads step and phase while the main one may hang
        # in a collective.
        heartbeat = Heartbeat(
            folder,
            rank,
            prepared.ranks,
            lambda: (prepared.progress.step, prepared.phase),
            prepared.owns_folder,
        )
        with (
            rank_log(folder, rank, lambda: prepared.progress.step),
            heartbeat,
            stop,
            ExitStack() as watched,
        ):
            if prepared.ranks > 1 and device.type == "cuda":
                watched.enter_context(
                    end_if_ranks_are_lost(
                        heartbeat, partial(_patience, prepared), partial(_end, heartbeat)
                    )
                )
            log.info(
                "rank %d of %d starts at step %d: %s, process %d, %s",
                rank,
                prepared.ranks,
                prepared.progress.step,
                socket.gethostname(),
                os.getpid(),
                device,
            )
            if rank == 0:
                text = opening(prepared, ranks.launcher)
                show(text)
                log.info("%s", text)
            try:
                result = train(prepared, args.stop_at, stop)
            except Exception as error:
                if is_collective_error(error):
                    # The collective's own error names no rank; the heartbeats do.
                    lost = describe_lost_ranks(folder, rank)
                    raise RuntimeError(f"{lost}. {error}") from error
                raise
    if not result["finished"]:
        # The same command line resumes; torchrun restarts nothing.
        command = shlex.join(train_command(args.recipe, args.overrides, str(folder), args.allow))
        outage = f"data cannot be read ({result['outage']}); " if "outage" in result else ""
        raise Stopped(
            f"{outage}at step {result['step']} of {prepared.recipe.train.steps}, saved; resume "
            f"with: {command}",
            result,
        )
    if not args.json and prepared.rank == 0:
        show(f"done: {result['checkpoint']}")
    return result


def _patience(run: "Run", phase: "Phase") -> float:
    """Return how many seconds a rank waits for others in a phase."""
    guards = run.recipe.guards
    slow = run.steps_here == 0 or phase in ("starting", "evaluating", "saving")
    return guards.first_timeout if slow else guards.timeout


def _end(heartbeat: "Heartbeat", error: RuntimeError) -> None:
    """End a process whose main thread waits for a GPU that waits for a lost rank."""
    heartbeat.fail(error)
    rank = heartbeat.beat.rank
    log.error("rank %d ends at step %d: %s", rank, heartbeat.beat.step, error)
    if rank:  # whose log does not reach the terminal
        print(f"memshard: error: rank {rank}: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def train_command(
    recipe: str, overrides: Sequence[str], folder: str, allow: Allowed | None
) -> list[str]:
    """Return the words of the command that trains, or resumes, a run."""
    command = ["memshard", "train", recipe, *overrides, "--run", folder]
    return command if allow is None else [*command, "--allow", allow]


def opening(prepared: "Run", launcher: str) -> str:
    """Return the opening screen: sizes, bytes, layout and kernels with the reason, run folder."""
    from memshard.trainer.cost.estimate import estimate

    recipe = prepared.recipe
    assert recipe.model.vocab_size is not None
    cost = estimate(
        recipe, prepared.ranks, recipe.model.vocab_size, half=prepared.dtype.itemsize == 2
    )
    begun = "starts" if recipe.init_from is None else f"starts from {recipe.init_from}"
    step, steps = prepared.progress.step, recipe.train.steps
    begun = f"resumes at step {step}" if step else begun
    ends = f"to step {steps}" if step <= steps else f"already beyond train.steps, {steps}"
    lines = [
        f"parameters   {cost.parameters.dense / 1e6:,.1f} M dense, "
        f"{cost.parameters.table / 1e6:,.1f} M in value tables",
        f"each rank    {cost.bytes.dense / 1e6:,.0f} MB dense and "
        f"{(cost.bytes.table + cost.host.table) / 1e6:,.0f} MB table (weights, "
        f"gradients, moments), about {cost.bytes.total / 1e6:,.0f} MB in all{_in_host(cost)}",
        f"a step       {cost.tokens_per_step:,} tokens; {describe_ranks(cost)}, "
        f"{cost.micro_batches} "
        f"x {cost.micro_batch} sequences each",
        f"launcher     {launcher}",
        f"arithmetic   {_arithmetic(prepared)}",
    ]
    if cost.tables:
        lines += [f"tables       {text}" for text in describe_tables(cost)]
        lines.append(f"table path   {_path(prepared)}")
    # A set: layers of the same mixer say the same, once.
    choices = {
        block.mixer.kernel_choice(prepared.device, prepared.dtype)
        for block in prepared.model.blocks
    }
    lines += [f"{choice[0]:<12} {choice[1]}" for choice in choices if choice]
    return "\n".join([*lines, f"run          {prepared.folder} ({begun}, {ends})"])


def _in_host(cost: "Estimate") -> str:
    return f" and {cost.host.total / 1e6:,.0f} MB in host memory" if cost.host.total else ""


def _arithmetic(prepared: "Run") -> str:
    """Return dtype and device of matrix products, and the loss scale if there is one."""
    from memshard.trainer.precision import DTYPES

    name = next(name for name, dtype in DTYPES.items() if dtype == prepared.dtype)
    scale = f", loss scale {prepared.loss_scale.value:g}" if prepared.loss_scale.dynamic else ""
    return f"{name} on {prepared.device}{scale}"


def _path(prepared: "Run") -> str:
    """Return what sums and updates rows, and why."""
    from memshard.models.kernels.backend import backend_for

    assert prepared.table_optimizer is not None
    _, reason = backend_for(prepared.table_optimizer.tables[0].weight.device)
    return f"in host memory: {reason}" if prepared.recipe.tables.place == "host" else reason


def run_folder(args: argparse.Namespace) -> Path:
    """Return the run's folder: the given one, or one named after the recipe. ValueError if it
    cannot be one.
    """
    named = Path(args.recipe)
    # A run folder as the recipe means that run.
    default = named if named.is_dir() else Path("runs") / named.stem
    folder = Path(args.folder) if args.folder else default
    if any("\ud800" <= character <= "\udfff" for character in str(folder)):
        raise ValueError(f"--run {str(folder)!r} is no UTF-8 text: choose another name")
    check_folder(folder)
    return folder
