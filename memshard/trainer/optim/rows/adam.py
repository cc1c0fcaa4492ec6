"""Row-sparse Adam for externalised value tables; works with or without the trainer.

From backward to the updated row, in one direction:

    loss.backward()
      models/memory/autograd.py   WeightedSum.backward: exact gradient of the weights
      models/memory/hidden.py     table.collect(Read): keep rows, weights and upstream gradient;
                                  the anchor counts the read
    RowAdam.step()                here
      _scale                      what a loss scaler or clipping has done to the anchor
      table.gradients(scale)      models/memory/row_gradient.py: sort the reads of all micro-batches
                                  and layers by row, one segment of reads for each distinct row
                                  (on several ranks: parallel/tables/sharded.py, replicas.py)
      Step.update                 step.py: step sizes and decays of these rows
      table.backend.adam_rows     models/kernels/: sum each segment to the row's gradient and update
                                  values and moments, in one pass
      table.drop_reads()          the reads are spent

plain_rows.py says what `adam_rows` computes; cpu_rows.py and triton_rows.py do the same, faster.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from memshard.models import compat
from memshard.models.memory.hidden import ANCHOR_UNIT
from memshard.models.memory.huge_pages import prefer_huge_pages
from memshard.models.memory.row_gradient import SortedReads
from memshard.models.memory.table import ValueTable
from memshard.parallel.tables.sharded import ShardedTable
from memshard.trainer.optim.rows.state_dict import as_whole, parts_of
from memshard.trainer.optim.rows.step import Step

Semantics = Literal["lazy", "row-step", "catch-up", "dense"]
Rounding = Literal["master", "stochastic"]
_BLOCK_ROWS = 4096
_SAMPLE_ROWS = 64


class RowAdam(Optimizer):
    """Adam on the rows read since the last step; the other rows and their moments do not move.

    semantics: what happens to a row that is not read in every step.
        lazy      As torch.optim.SparseAdam: its moments wait, bias correction counts all steps.
        row-step  Bias correction counts the row's own steps, so its first ones are not too large.
        catch-up  Before a step its moments decay as often as it was left out: dense Adam's moments,
                  without its drift.
        dense     As torch.optim.Adam: every row moves in every step. No longer sparse in time.
    rounding: what happens to small changes of tables in half precision. master keeps an fp32 copy
    of the values; stochastic rounds up or down at random, so that small changes count on average.
    clip: the largest norm of all tables' gradients together, each row counted once over all ranks;
    0 is none and saves a pass. alone: whether tables that `shard_tables` has not seen may learn
    from the reads of this process, although there are others. There is no weight decay. Moments are
    fp32 at least, as large as the table; `last_step` in a table's state says when each row was last
    read, 0 if never.

    Gradients of all micro-batches and of all layers that share a table are summed before the one
    update. Where tables are sharded, all ranks must step together.

    In `param_groups` a table is represented by its `anchor` of two numbers (see hidden.py):
    GradScaler's unscaling and inf check, and clipping by the norm of all groups, act on the
    anchor's gradient, and `step` scales the row gradients accordingly. `zero_grad` forgets
    collected reads. ValueError for no tables, visible ones or unknown choices; `step` raises
    RuntimeError for a table that `shard_tables` has not seen where there are several processes.
    """

    def __init__(
        self,
        tables: Iterable[ValueTable],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        semantics: Semantics = "lazy",
        rounding: Rounding = "master",
        clip: float = 0.0,
        alone: bool = False,
    ) -> None:
        self.tables = list(tables) if isinstance(tables, Iterable) else [tables]
        if not self.tables:
            raise ValueError(
                "there are no tables: externalize_tables(model) returns those of the model's "
                "memories, if it has any"
            )
        for table in self.tables:
            if not (isinstance(table, ValueTable) and table.hidden):
                raise ValueError(
                    "RowAdam needs externalised tables: pass it what externalize_tables(model) "
                    "returns"
                )
        stored = {id(x): x.weight for x in self.tables if not compat.is_fake(x.weight)}
        # 0 is the address of values that are nowhere.
        addresses = [x for x in (values.data_ptr() for values in stored.values()) if x]
        if len(set(addresses)) < len(addresses):
            raise ValueError(
                "two tables have the same values in memory, and would both update them: let layers "
                "share the table itself, ProductKeyMemory(..., values=other.values)"
            )
        for name, value, choices in (
            ("semantics", semantics, get_args(Semantics)),
            ("rounding", rounding, get_args(Rounding)),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas is {betas!r}; it must be two numbers, such as (0.9, 0.999)")
        for name, number, limit in (
            ("lr", lr, math.inf),
            ("betas[0]", betas[0], 1.0),
            ("betas[1]", betas[1], 1.0),
            ("eps", eps, math.inf),
            ("clip", clip, math.inf),
        ):
            if not isinstance(number, float | int | Tensor):
                raise ValueError(f"{name} is {number!r}; it must be a number")
            if not 0.0 <= number < limit:
                raise ValueError(f"{name} is {number}; it must be at least 0 and below {limit}")
        self.semantics, self.rounding = semantics, rounding
        self.clip = clip
        self.alone = alone
        self._touched: list[tuple[int, int | Tensor]] = [(0, 0) for _ in self.tables]
        self._norm: Tensor | None = None
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        """For every table, its values after the last step, and their version."""
        super().__init__(
            [table.anchor for table in self.tables], {"lr": lr, "betas": betas, "eps": eps}
        )
        for table in self.tables:
            self.state[table.anchor] = _new_state(table, semantics, rounding)
            table.has_optimizer, table.spent_by = True, None

    def __getstate__(self) -> dict[str, Any]:
        # torch's leaves out what a subclass adds.
        names = ("tables", "semantics", "rounding", "clip", "alone", "_touched", "_norm")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = {}
        for table in self.tables:
            table.has_optimizer = True

    @property
    def touched(self) -> list[tuple[int, int]]:
        """For every table, the reads by this rank's tokens and the local rows updated, in the last
        step. Waits for a GPU, as `norm` does.
        """
        return [(reads, int(rows)) for reads, rows in self._touched]

    @property
    def norm(self) -> float | None:
        """The norm of all tables' gradients in the last step before clipping; None without."""
        return None if self._norm is None else float(self._norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ValueError: RowAdam updates the tables that it was made with, and no parameters."""
        if self.param_groups:
            raise ValueError(
                "a RowAdam takes no more groups: make it with all tables, or make another for "
                "other tables and combine them, CombinedOptimizer(first, second)"
            )
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the rows that were read, then forget the reads."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for table in self.tables:
            if table.spent_by and table.spent_by() not in (None, self):
                raise RuntimeError(
                    "another RowAdam has taken this backward pass's reads of a table, and left "
                    "none for this one: make one RowAdam for each table. Where each has a "
                    "backward pass of its own, call zero_grad() of the other after its step"
                )
            if table.anchor.grad is None:
                # Cleared by hand, over param_groups.
                table.drop_reads()
        factor = self._clipping() if self.clip else None
        group = {id(anchor): group for group in self.param_groups for anchor in group["params"]}
        for index, table in enumerate(self.tables):
            if id(table.anchor) not in group:
                raise RuntimeError(
                    "a table has got new values since RowAdam was made for it, maybe since it was "
                    "on the meta device: load the values first, then make the optimizer"
                )
            _follow_device(table, self.state[table.anchor])
            self._follow_values(index)
            self._touched[index] = self._update(table, group[id(table.anchor)], factor)
            self._seen[index] = weakref.ref(table.weight), table.weight._version
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the reads collected since the last step."""
        for table in self.tables:
            table.drop_reads()

    def state_dict(self) -> dict[str, Any]:
        """Return the state; that of split tables in tensors of the whole tables' shapes."""
        return as_whole(self, self.tables, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of whole tables. ValueError for the part of a table on another rank."""
        super().load_state_dict(parts_of(self, self.tables, state_dict))

    def unscale(self, scale: float) -> None:
        """Divide the collected gradients by a loss scale, as GradScaler.unscale_ does."""
        for table in self.tables:
            if table.anchor.grad is not None:
                table.anchor.grad.div_(scale)

    def _clipping(self) -> Tensor:
        """Return the factor that brings the norm of all tables' gradients down to `clip`."""
        squares = torch.zeros((), dtype=torch.float64, device=self.tables[0].weight.device)
        for table in self.tables:
            total = torch.zeros((), dtype=torch.float64, device=table.weight.device)
            for part in table.gradients(_scale(table)):
                for first, last in part.blocks():
                    total += part.sums(first, last).double().square().sum()
            # The rows of a table's shards are different rows: their squares add up.
            squares += table.sum_over_shards(total).to(squares.device)
        self._norm = squares.sqrt()
        # With the 1e-6 of torch's clip_grad_norm_, to the same result.
        return torch.clamp(self.clip / (self._norm + 1e-6), max=1.0)

    def _follow_values(self, index: int) -> None:
        """Take over values that were loaded or written into a table since the last step.

        The fp32 copy would bring back what was there before, in the rows that are read.
        """
        table = self.tables[index]
        state, (values, version) = self.state[table.anchor], self._seen.get(index, (None, 0))
        if "master" not in state:
            return
        _check_state(table, state, self.semantics, self.rounding)
        unchanged = values and values() is table.weight and version == table.weight._version
        if unchanged and table.reads and not table.weight.is_cuda:
            # What is written through `weight.data` has no version: a few rows show it. Not on a
            # GPU, which it would wait for: kernels there take over the rows that they update.
            rows = table.reads[0].rows[:_SAMPLE_ROWS]
            copy, now = state["master"][rows], table.weight[rows]
            unchanged = torch.equal(copy.to(now.dtype), now)
        if unchanged:
            return
        for copy, now in zip(
            state["master"].split(_BLOCK_ROWS), table.weight.split(_BLOCK_ROWS), strict=True
        ):
            # Only what differs: the copy knows more digits of the others.
            copy.copy_(torch.where(copy.to(now.dtype) == now, copy, now.to(copy.dtype)))

    @torch.compiler.disable
    def _update(
        self, table: ValueTable, group: dict[str, Any], factor: Tensor | None
    ) -> tuple[int, int | Tensor]:
        """Take one step on a table; return the number of reads and of updated rows."""
        # Without reads a rank still takes part in the sum over replicas, which may have some.
        if not table.reads and table.replica_count == 1:
            return 0, 0
        if not self.alone:
            _check_processes(table)
        asked = table.reads_asked
        state = self.state[table.anchor]
        _check_state(table, state, self.semantics, self.rounding)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step = Step(self.semantics, state["step"], group["lr"], beta1, beta2, group["eps"])
        updated: int | Tensor = 0
        scale = _scale(table)
        parts = table.gradients(scale if factor is None else scale * factor.to(scale.device))
        for part in _with_all_rows(parts, table) if self.semantics == "dense" else parts:
            updated = updated + part.count
            table.backend.adam_rows(step.update(table, state, part))
            # Kernels write where autograd does not see it: a backward pass through the old values
            # must fail, as it does with a parameter.
            increment_version(table.weight)
            last: Tensor = state["last_step"]
            if self.semantics == "dense":
                # Rows without reads are among them.
                read = part.starts.diff() > 0
                last[part.rows] = torch.where(read, step.number, last[part.rows])
            else:
                last.index_fill_(0, part.rows, step.number)
        table.drop_reads()
        table.spent_by = weakref.ref(self)
        return asked, updated


def _follow_device(table: ValueTable, state: dict[str, Any]) -> None:
    """Bring a table's state to where the table is: trainers move models after their optimizers are
    made. torch's own optimizers have no state until their first step.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and value.device != table.weight.device:
            state[name] = prefer_huge_pages(value.to(table.weight.device))


def _check_processes(table: ValueTable) -> None:
    """Raise RuntimeError if other processes may read copies of a table that is not theirs."""
    # Here, because torch.distributed may be set up after the optimizer.
    if isinstance(table, ShardedTable) or not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_world_size() > 1:
        raise RuntimeError(
            f"there are {dist.get_world_size()} processes, and this table would learn from the "
            "reads of one: DDP does not see it. In place of externalize_tables(model), split the "
            "tables over the processes, shard_tables(model), or keep copies that learn from the "
            "reads of all, shard_tables(model, dist.new_subgroups(1)[0], "
            "replicas=dist.group.WORLD). Where no other process has the table, or all read the "
            "same: RowAdam(tables, alone=True)"
        )


def _check_state(
    table: ValueTable, state: dict[str, Any], semantics: Semantics, rounding: Rounding
) -> None:
    """Raise RuntimeError if the state is that of another table or of other semantics, or if the
    table has another dtype than when its state was made.
    """
    shape = tuple(table.weight.shape)
    for name, value in state.items():
        # Kernels trust these sizes.
        if isinstance(value, Tensor) and value.dim() and tuple(value.shape) != shape[: value.dim()]:
            raise RuntimeError(
                f"a table is {shape} and its optimizer state {name} {tuple(value.shape)}: load the "
                "state that was saved with this model"
            )
    if semantics == "row-step" and "row_step" not in state:
        raise RuntimeError("the state that was loaded was not saved with the semantics 'row-step'")
    moments, dtype = state["exp_avg"], torch.promote_types(table.weight.dtype, torch.float32)
    lacks_copy = rounding == "master" and table.weight.dtype != dtype and "master" not in state
    if moments.dtype != dtype or lacks_copy:
        raise RuntimeError(
            f"a table has become {table.weight.dtype} since RowAdam was made for it: cast the "
            "model first, then make the optimizer"
        )


def _scale(table: ValueTable) -> Tensor:
    """Return the factor the row gradients still need: what has scaled the anchor's gradient since
    backward (a loss scaler, clipping), times the table's own.
    """
    if table.anchor.grad is None:
        return torch.ones((), dtype=torch.float64)
    # Each read added ANCHOR_UNIT, so after n reads the gradient is n units times whatever a loss
    # scaler or clipping has multiplied it by since; dividing by n units leaves that factor.
    units = table.anchor.grad[0].double() / (len(table.reads) * ANCHOR_UNIT)
    return units * table.gradient_scale


def _with_all_rows(parts: Iterable[SortedReads], table: ValueTable) -> Iterator[SortedReads]:
    """Yield the same gradients, and zero for the rows that have none."""
    start, end, device = 0, len(table.weight), table.weight.device
    parts = iter(parts)
    part = next(parts, None)
    while part is not None:
        after = next(parts, None)
        # Rows between those that were read belong to the part before, so each
        # row comes exactly once.
        stop = end if after is None else int(part.rows[-1]) + 1
        yield part.of(torch.arange(start, stop, device=device))
        start, part = stop, after
    if start < end:
        rows = torch.arange(start, end, device=device)
        upstream = table.weight.new_zeros(
            1, table.weight.shape[1], dtype=torch.promote_types(table.weight.dtype, torch.float32)
        )
        yield SortedReads(
            rows,
            rows.new_zeros(len(rows) + 1),
            bags=rows[:0],
            weights=upstream.new_zeros(0),
            upstream=upstream,
            backend=table.backend,
        )


def _new_state(table: ValueTable, semantics: Semantics, rounding: Rounding) -> dict[str, Any]:
    dtype = torch.promote_types(table.weight.dtype, torch.float32)
    state: dict[str, Any] = {"step": 0}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = prefer_huge_pages(torch.empty_like(table.weight, dtype=dtype)).zero_()
    if table.weight.dtype != dtype and rounding == "master":
        state["master"] = prefer_huge_pages(torch.empty_like(table.weight, dtype=dtype)).copy_(
            table.weight
        )
    # Floating point, because optimizers cast what they load to the dtype of the anchor; exact up to
    # 2^24 steps.
    state["last_step"] = table.weight.new_zeros(len(table.weight), dtype=dtype)
    if semantics == "row-step":
        state["row_step"] = table.weight.new_zeros(len(table.weight), dtype=dtype)
    return state
