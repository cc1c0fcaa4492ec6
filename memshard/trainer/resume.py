"""Save a run, resume it, and rewind it to a checkpoint."""

import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer
from memshard.models.memory.table import find_tables
from memshard.parallel.checksum import check_copies
from memshard.parallel.collectives import broadcast_from_rank0
from memshard.trainer.checkpoint.folders import (
    checkpoint_folder,
    committed,
    find_checkpoints,
    is_committed,
    named_step,
    no_marker,
    prune,
    remove,
    set_aside,
    without_marker,
)
from memshard.trainer.checkpoint.init_from import init_from
from memshard.trainer.checkpoint.save_load import (
    DamagedCheckpoint,
    is_count,
    load_state_together,
    load_tensors,
    step_of,
    table_steps_of,
)
from memshard.trainer.guards import all_reduce_verdict
from memshard.trainer.run import Progress, Run
from memshard.trainer.run_folder import CHECKPOINTS

log = logging.getLogger(__name__)

_PAUSES = (0.0, 1.0, 5.0)
"""Seconds before each try of a save that ends a run; batch systems leave it some 30."""


def save(run: Run, wait: bool = True) -> Path:
    """Write a checkpoint of the finished step unless there is one; return its folder. All ranks
    call it. Needs nothing from the data folder.

    wait: until it is committed; OSError if the disk refuses it several times, RuntimeError if a
    weight is not finite. Otherwise only until training may go on, and both are just said.
    RuntimeError if another process has taken the folder, or if copies of a tensor on several ranks
    differ: nothing is written then.
    """
    run.phase = "saving"
    if not broadcast_from_rank0(run.owns_folder()):
        raise RuntimeError(f"{run.folder} belongs to another process now: nothing was saved")
    # One save at a time. This raises what went wrong with the one before, but for the disk.
    run.saving.wait()
    root = run.folder / CHECKPOINTS
    folder = checkpoint_folder(root, run.progress.step)
    # Rank 0 decides: on a slow shared file system the others may not see the same folders yet.
    if broadcast_from_rank0(run.rank == 0 and _is_there(folder)):
        return folder
    tensors = checkpoint_tensors(run)
    if not _weights_finite(run, tensors):
        problem = f"a weight is not finite after step {run.progress.step}: nothing was saved"
        if wait:
            raise RuntimeError(f"{problem}, and the checkpoints before it stay")
        log.warning("%s", problem)
        return folder
    # Of each tensor one copy is written: a mix of ranks that have drifted apart would be lost work
    # that looks like a good checkpoint.
    check_copies(tensors)
    for pause in _PAUSES:
        time.sleep(pause)
        _start_saving(run, root, folder, tensors)
        if not wait:
            return folder
        run.saving.wait()
        if run.saving.failed is None:
            return folder
    assert run.saving.failed is not None
    raise run.saving.failed


def _is_there(folder: Path) -> bool:
    # If that cannot be read, the save says so, on all ranks.
    with suppress(OSError):
        return is_committed(folder)
    return False


def _start_saving(run: Run, root: Path, folder: Path, tensors: dict[str, Tensor]) -> None:
    train = run.recipe.train
    # Tables are too large for a second copy, so they are written before training goes on.
    tables = tuple(f".{name}.weight" for name, _ in find_tables(run.model))
    run.saving.start(
        folder,
        tensors,
        _state(run),
        run.files,
        [name for name in tensors if name.endswith(tables)] if tables else [],
        lambda: prune(root, train.keep, train.keep_every),
    )


def _weights_finite(run: Run, tensors: dict[str, Tensor]) -> bool:
    """Return whether all weights and buffers are finite on every rank, reading each once."""
    bad = torch.zeros((), dtype=torch.bool, device=run.device)
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name.startswith("model.") and local.is_floating_point() and local.numel():
            # The smallest and largest number are not finite if any is not. 0.12 s a GB on one
            # core, where isfinite takes 4 s and a tensor as large, and the save's hashes 2.5 s.
            bad |= ~torch.stack(torch.aminmax(local)).isfinite().all().to(run.device)
    nothing = torch.zeros((), device=run.device)
    *_, (found,) = all_reduce_verdict(nothing, nothing, bad)
    return not found


def resume(run: Run) -> None:
    """Load the newest committed checkpoint, or with a warning an older one if that is damaged; if
    there is none, start from the recipe's `init_from`.

    ValueError if the data has changed since, if no checkpoint is whole, or if `init_from` does not
    fit.
    """
    damaged: dict[Path, DamagedCheckpoint] = {}
    # All ranks must try the same folders in the same order, since loading is a collective.
    root = run.folder / CHECKPOINTS
    checkpoints, unmarked = broadcast_from_rank0((committed(root), without_marker(root)))
    if unmarked and not checkpoints:
        raise ValueError(
            f"{no_marker(unmarked[-1])}: finish it, or delete that folder to begin the run anew"
        )
    for folder in reversed(checkpoints):
        try:
            _load(run, folder)
            break
        except DamagedCheckpoint as error:
            damaged[folder] = error
    if checkpoints and len(damaged) == len(checkpoints):
        # Not a fresh start, which would lose the run without a word.
        raise damaged[checkpoints[-1]]
    if run.rank == 0:
        for folder, problem in damaged.items():
            log.warning(
                "%s is damaged (%s): the run goes on from step %d",
                set_aside(folder, "damaged"),
                problem.reason,
                run.progress.step,
            )
        for folder in unmarked:
            if (named_step(folder) or 0) > run.progress.step:
                log.warning(
                    "%s: the run goes on from step %d", no_marker(folder), run.progress.step
                )
    if not checkpoints and run.recipe.init_from is not None:
        _start_from(run, broadcast_from_rank0(find_checkpoints(Path(run.recipe.init_from))[0]))


def rewind(run: Run) -> None:
    """Load the newest checkpoint, and go on with the data after the last batch. All ranks call it.

    If the previous rewind loaded that checkpoint, the one before it is loaded. RuntimeError if
    guards.rewinds are used up.
    """
    guards, before = run.recipe.guards, run.progress
    if before.rewinds >= guards.rewinds:
        raise RuntimeError(
            f"the loss spiked again at step {before.step} after {before.rewinds} rewinds "
            "(guards.rewinds): "
            "begin another run (init_from) at an earlier checkpoint, with a lower "
            "optimizer.lr or tables.lr, or look at the data there"
        )
    run.saving.wait()
    root = run.folder / CHECKPOINTS
    # Rank 0 decides, as in `save`.
    _load(run, broadcast_from_rank0(_rewind_target(run, root) if run.rank == 0 else None))
    step = run.progress.step
    run.continue_from(
        replace(
            run.progress,
            spikes=before.spikes,
            rewinds=before.rewinds + 1,
            # Batches stay passed over: training on the same data would meet the same spike.
            left_out=before.batch - step,
            rewound_to=step,
        )
    )


def checkpoint_tensors(run: Run) -> dict[str, Tensor]:
    """Return everything that a checkpoint keeps as tensors, by name. All ranks call it.

    They share memory with the run, except those that `engine.restore` and `Carried.restore` must
    take over once they are loaded.
    """
    tensors = run.engine.state(run.learned())
    for layer, memory in run.model.memories():
        if memory.key_use is not None:
            tensors[f"key_share.blocks.{layer}.memory"] = memory.key_use.share
            tensors[f"key_last_read.blocks.{layer}.memory"] = memory.key_use.last_read
    carried = run.carried_states
    return tensors if carried is None else tensors | carried.tensors(run.mesh)


def _start_from(run: Run, checkpoint: Path) -> None:
    """Take over what another run has learned. ValueError if its tokenizer is another one."""
    tokenizer, data = checkpoint / TOKENIZER_FILE, run.recipe.data.path
    if tokenizer.exists() and Tokenizer(tokenizer).sha256 != load_index(data).tokenizer_sha256:
        raise ValueError(
            f"{data} was built with another tokenizer than {checkpoint}: its tokens mean "
            "nothing to that model"
        )
    learned = run.engine.state(run.learned(), everywhere=True)
    init_from(checkpoint, run.model, learned, run.table_optimizer)
    run.engine.restore(learned)


def _rewind_target(run: Run, root: Path) -> Path:
    """Return the checkpoint to go back to, and remove a later one, which belongs to the branch that
    is abandoned. For rank 0.
    """
    checkpoints = committed(root)
    last = checkpoint_folder(root, run.progress.rewound_to or 0)
    if len(checkpoints) > 1 and checkpoints[-1] == last:
        # The run has been back there and met a spike on other data as well, so the weights
        # lead to it.
        remove(checkpoints.pop())
    return checkpoints[-1]


def _load(run: Run, folder: Path) -> None:
    state = load_state_together(folder)
    progress = _progress_of(folder, state)
    tables = dict(find_tables(run.model))
    steps = table_steps_of(folder, state, tables)
    if state.get("stream") != run.stream.fingerprint:
        raise ValueError(
            f"{run.recipe.data.path} is not the data that {folder} was trained on: "
            "give the original folder as data.path, or another --run folder"
        )
    tensors = checkpoint_tensors(run)
    load_tensors(folder, tensors)
    run.engine.restore(tensors)
    if run.carried_states is not None:
        run.carried_states.restore(tensors, run.mesh)
    run.continue_from(progress)
    run.loss_scale.restore(state["loss_scale"])
    for name, table in tables.items():
        assert run.table_optimizer is not None
        run.table_optimizer.state[table.anchor]["step"] = steps[name]


def _progress_of(folder: Path, state: dict[str, Any]) -> Progress:
    """Return the progress in a checkpoint's state. DamagedCheckpoint if a number of the state is
    none that a run could have.
    """
    step_of(folder, state)
    try:
        progress, scale = Progress(**state["progress"]), dict(state["loss_scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(folder, f"state.json is no run's ({error})") from error
    counts = {**vars(progress), "rewound_to": progress.rewound_to or 0}
    losses = counts.pop("losses")
    numbers = [*losses, *scale.values()] if isinstance(losses, list) else [losses]
    if not all(map(is_count, counts.values())) or not all(
        isinstance(number, int | float) for number in numbers
    ):
        raise DamagedCheckpoint(folder, "state.json has numbers that are none of a run's")
    return progress


def _state(run: Run) -> dict[str, Any]:
    """Return what a checkpoint keeps besides tensors."""
    rows = run.table_optimizer
    steps = {
        name: rows.state[table.anchor]["step"] for name, table in find_tables(run.model) if rows
    }
    return {
        "progress": vars(run.progress),
        "loss_scale": run.loss_scale.state(),
        "table_steps": steps,
        "stream": run.stream.fingerprint,
    }
