"""Build what a training step needs, and take the step, without a run folder, recipe or data stream.

    training = build_for_training(config, OptimizerConfig(lr=1e-3), device="cuda")
    for step in range(steps):
        outcome = training_step(training, micro_batches, loss, step)

`memshard train` and hand-written loops both go through these two functions. A step is

    forward, backward   of each micro-batch; ranks exchange dense gradients in the last one
    gradient norm       of the dense gradient over all ranks
    one verdict         the ranks add up their losses and agree on whether all is well
    update              of dense parameters, table rows and query statistics; or of none of them
    loss scale          adapts to an overflow, or the reversible grid to streams beyond it
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from memshard.models.config import ModelConfig
from memshard.models.decoder_block import DecoderBlock
from memshard.models.initialize import initialize
from memshard.models.memory.query_norm import QueryNorm
from memshard.models.memory.table import ValueTable, find_tables
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.recompute.grid import Grid
from memshard.models.seq2seq import build_model
from memshard.models.transformer import Transformer
from memshard.parallel.apply import Share, apply
from memshard.parallel.checksum import check_copies
from memshard.parallel.mesh import tensor_size
from memshard.parallel.spec import ShardSpec
from memshard.parallel.tables.layouts import Layouts
from memshard.trainer.checkpoint.global_tensors import model_tensors, optimizer_tensors
from memshard.trainer.config.fields import check_finite
from memshard.trainer.config.optimizers import OptimizerConfig, TableOptimizerConfig
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.engine.native import MakeOptimizer, NativeEngine
from memshard.trainer.guards import all_reduce_verdict, gradients_finite
from memshard.trainer.optim.dense.schedule import learning_rate
from memshard.trainer.optim.rows.adam import RowAdam
from memshard.trainer.precision import LossScale, autocast, compute_dtype, store_tables
from memshard.trainer.stop_signal import StopSignal
from memshard.trainer.watch.heartbeat import Phase

if TYPE_CHECKING:
    from memshard.trainer.engine.deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)
MicroBatch = TypeVar("MicroBatch")


@dataclass(kw_only=True)
class Training:
    """All that a training step needs. `engine.model` is what to call in training: `model`, wrapped
    where ranks exchange gradients.

    table_optimizer: None for a model without memory layers. placement: how tensors are split over
    the mesh, by name; what it does not list is the same on all ranks. clip: largest norm of the
    dense gradient, 0 for none. learning_rate: of the dense parameters, from the step's number
    counted from 0; may be replaced.
    """

    model: nn.Module
    engine: "NativeEngine | DeepSpeedEngine"
    table_optimizer: RowAdam | None
    loss_scale: LossScale
    device: torch.device
    dtype: torch.dtype
    mesh: DeviceMesh | None
    placement: dict[str, ShardSpec]
    clip: float
    learning_rate: Callable[[int], float]
    phase: Phase = "starting"
    query_norms: list[QueryNorm] = field(default_factory=list)

    @property
    def grid(self) -> Grid | None:
        """The number grid of a reversible model's streams."""
        return self.model.grid if isinstance(self.model, Transformer) else None

    def check_copies(self) -> None:
        """Raise RuntimeError if weights or optimizer states that should be equal on several ranks
        are not. All ranks call it.
        """
        learned = self.learned()
        kept = self.engine.state(learned)
        # DeepSpeed computes with other weights than a checkpoint keeps.
        used = {f"{name} in use": x for name, x in learned.items() if kept.get(name) is not x}
        check_copies(kept | used)

    def learned(self) -> dict[str, Tensor]:
        """Return the weights, and what the optimizers keep for them, by their names in a
        checkpoint. Those that are split over ranks are DTensors, and all share memory.
        """
        return model_tensors(self.model, self.placement, self.mesh) | optimizer_tensors(
            self.model, self.engine.optimizer, self.table_optimizer, self.placement, self.mesh
        )


def build_for_training(
    model: ModelConfig | nn.Module,
    optimizer: OptimizerConfig | MakeOptimizer | None = None,
    tables: TableOptimizerConfig | None = None,
    train: TrainConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    mesh: DeviceMesh | None = None,
    layout: Layouts = "rows",
    share: Share = "heads",
) -> Training:
    """Build a model on its device, spread over the mesh, its tables hidden, with all that trains
    it. All ranks call it with the same arguments.

    model: settings, or a module. A module on the meta device is initialised from `train.seed`; any
    other keeps its weights and their dtypes, and trains in place. optimizer: settings of the dense
    optimizer, or a function that makes a torch optimizer of some parameters, whose learning rate
    then stays unless `learning_rate` is replaced. tables: of the value tables and their row-sparse
    Adam. train: what counts here are steps (for the schedule), seed, precision, loss_scale, engine,
    zero, offload, clip, compile, what backward recomputes, and label_smoothing; for DeepSpeed also
    batch and micro_batch. mesh: of all ranks, from `build_mesh`; None for one process. layout,
    share: see `parallel.apply`. ValueError where sizes do not divide or a package is missing.
    """
    optimizer = optimizer or OptimizerConfig()
    tables, train = tables or TableOptimizerConfig(), train or TrainConfig()
    for name, settings in (
        ("model", model),
        ("optimizer", optimizer),
        ("tables", tables),
        ("train", train),
    ):
        if is_dataclass(settings):
            check_finite(settings, f"{name}.")
    device = torch.device(device)
    if isinstance(model, ModelConfig):
        # On the meta device no rank ever allocates a whole table of which it stores a shard.
        with torch.device("meta"):
            model = build_model(model)
    empty = any(parameter.is_meta for parameter in model.parameters())
    placement = apply(model, mesh, layout, share)
    hidden = [table for _, table in find_tables(model)]
    if empty:
        # Still on the meta device, where converting allocates nothing.
        store_tables(model, tables.dtype)
    for table in hidden:
        # Before the model moves: such a table must not follow it.
        table.host = tables.place == "host"
        table.checks_anchor = False
    if empty:
        model.to_empty(device=device)
        initialize(model, train.seed)
    else:
        model.to(device)
    query_norms = [module for module in model.modules() if isinstance(module, QueryNorm)]
    for query_norm in query_norms:
        # Statistics enter when a step is done, so that one that is skipped leaves no trace.
        query_norm.deferred = True
    if isinstance(model, Transformer):
        model.configure(
            Recompute(train.checkpointing, train.chunk, train.segments, train.check_inversion),
            train.label_smoothing,
        )
        if train.compile:
            _compile_layers(model, train, mesh)
    dtype = compute_dtype(train.precision, device)
    engine = _engine(model, optimizer, train, mesh, placement, dtype)
    return Training(
        model=model,
        engine=engine,
        table_optimizer=_row_adam(hidden, tables) if hidden else None,
        loss_scale=LossScale(train.loss_scale, dtype),
        device=device,
        dtype=dtype,
        mesh=mesh,
        placement=placement,
        clip=train.clip,
        learning_rate=partial(learning_rate, optimizer, steps=train.steps)
        if isinstance(optimizer, OptimizerConfig)
        else partial(_constant, engine.optimizer.defaults["lr"]),
        query_norms=query_norms,
    )


def _constant(rate: float, step: int) -> float:
    return rate


def _compile_layers(model: Transformer, train: TrainConfig, mesh: DeviceMesh | None) -> None:
    """Compile each block in place, at its first use; names and parameters stay.

    Of blocks that are not one graph mixer and feedforward are compiled, each on its own. Such are
    blocks with a memory, whose reads are custom functions with collected gradients, kernels of
    their own and exchanges between ranks; those that backward repeats in parts; and those that
    tensor-parallel ranks share.
    """
    whole = model.grid is None and train.checkpointing == "none" and not train.chunk
    whole = whole and tensor_size(mesh) == 1
    for block in model.blocks:
        if isinstance(block, DecoderBlock):
            block.cross.compile()
        elif whole and block.mixer.one_graph and not block.has_table:
            block.compile()
            continue
        block.mixer.compile()
        if block.feedforward is not None:
            block.feedforward.compile()


def _engine(
    model: nn.Module,
    optimizer: OptimizerConfig | MakeOptimizer,
    train: TrainConfig,
    mesh: DeviceMesh | None,
    placement: dict[str, ShardSpec],
    dtype: torch.dtype,
) -> "NativeEngine | DeepSpeedEngine":
    if train.engine == "torch":
        return NativeEngine(model, optimizer, mesh, placement, shard_states=train.zero > 0)
    if not isinstance(optimizer, OptimizerConfig):
        raise ValueError(
            "train.engine is deepspeed, which needs an OptimizerConfig: give one, or set "
            "train.engine to torch"
        )
    from memshard.trainer.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, optimizer, train, mesh, placement, dtype)


def _row_adam(tables: list[ValueTable], config: TableOptimizerConfig) -> RowAdam:
    return RowAdam(
        tables, config.lr, config.betas, config.eps, config.semantics, config.rounding, config.clip
    )


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """The outcome of one training step, the same on all ranks.

    loss: sum over all ranks and micro-batches. norm: of the dense gradient, before clipping. rate:
    the learning rate used, 0 if the step was skipped. overflow: whether a gradient was not finite
    on some rank. left_grid: whether a reversible stream left its grid, which is coarser now.
    stopping: whether some rank was told to stop. save_due: whether some rank asks for a save.
    """

    loss: float
    norm: float
    rate: float
    skipped: bool
    overflow: bool
    left_grid: bool
    stopping: bool
    save_due: bool


def training_step(
    training: Training,
    batches: Sequence[MicroBatch],
    loss: Callable[[nn.Module, MicroBatch], Tensor],
    step: int,
    accept: Callable[[float], bool] | None = None,
    stop: StopSignal | None = None,
    save_due: Callable[[], bool] = lambda: False,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepOutcome:
    """Train on this rank's micro-batches, or skip the update on all ranks if any of them has a
    gradient that is not finite or a reversible stream beyond its grid. All ranks call it.

    loss: called with the model and a micro-batch; its values must add up, over micro-batches and
    over ranks with different data, to the loss to minimise, so a mean is divided by the size of the
    whole batch. step: counted from 0; decides the learning rate. accept: asked with the step's loss
    before the update, with the same answer on all ranks; False skips it. stop: read when the ranks
    agree on a verdict, so that a signal on one rank stops all after the same step. save_due: asked
    then as well. meanwhile: called before the verdict, while a GPU still computes the gradients.
    """
    model, engine, grid = training.model, training.engine, training.grid
    scale = training.loss_scale.value
    if not model.training:
        # After an evaluation. Not in every step: it walks through all modules.
        model.train()
    if grid is not None:
        grid.clear()
    training.phase = "forward and backward"
    total = torch.zeros((), device=training.device)
    for number, batch in enumerate(batches, 1):
        # Gradients add up locally, and are exchanged once a step, in the last backward.
        with engine.forward_context(last=number == len(batches)):
            # Forward only: autograd runs each backward in the dtype of its forward.
            with autocast(training.dtype, training.device):
                share = loss(engine.model, batch)
            engine.backward(share, scale)
        # Not in place: the sum has the dtype of the losses, which may be fp64.
        total = total + share.detach()

    # Norm and checks stay on the device; the verdict below is the only wait before the update.
    norm = engine.gradient_norm(scale)
    tables = training.table_optimizer.tables if training.table_optimizer else ()
    finite = gradients_finite(norm, tables)
    left_range = grid is not None and grid.left_range().any()
    meanwhile()
    training.phase = "agreeing on a verdict"
    # Tensor-parallel ranks compute the same loss, so it is counted once for each group.
    total = total / tensor_size(training.mesh)
    batch_loss, length, (overflow, left_grid, stopping, due) = all_reduce_verdict(
        total, norm, ~finite, left_range, stop is not None and stop.received, save_due()
    )
    skipped = overflow or left_grid or not (accept is None or accept(batch_loss))
    training.phase = "updating"
    rate = 0.0
    if skipped:
        _skip(training)
    else:
        rate = _update(training, step, norm, scale)
    if grid is not None and left_grid:
        # Gradients of streams that were rebuilt wrongly say nothing about the loss scale.
        _coarsen(grid, step + 1)
    else:
        training.loss_scale.update(overflow)
    return StepOutcome(
        loss=batch_loss,
        norm=length,
        rate=rate,
        skipped=skipped,
        overflow=overflow,
        left_grid=left_grid,
        stopping=stopping,
        save_due=due,
    )


def _update(training: Training, step: int, norm: Tensor, scale: float) -> float:
    """Update everything that learns; return the dense learning rate."""
    rate = training.learning_rate(step)
    training.engine.step(rate, norm, training.clip, scale)
    if training.table_optimizer is not None:
        # As `engine.step` does with the gradients of its parameters, which anchors are not among.
        training.table_optimizer.unscale(scale)
        training.table_optimizer.step()
    for query_norm in training.query_norms:
        query_norm.commit()
    return rate


def _skip(training: Training) -> None:
    """Drop the gradients and the query statistics of the step."""
    # The verdict is shared, so no rank is left waiting for another one's update.
    training.engine.clear()
    if training.table_optimizer is not None:
        training.table_optimizer.zero_grad()
    for query_norm in training.query_norms:
        query_norm.discard()


def _coarsen(grid: Grid, step: int) -> None:
    """Make the grid coarser, and log which blocks left it. step: counted from 1."""
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
