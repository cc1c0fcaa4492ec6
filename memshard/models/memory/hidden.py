"""Hide a table from dense optimizers and wrappers: the anchor and the collected reads.

A hidden table is not a parameter, because DDP and DeepSpeed broadcast, cast and all-reduce every
parameter, and optimizers want a dense gradient of it: for a table of 10^9 values, 4 GB, of which a
step fills a thousandth. So its gradient is collected read by read, for a row-sparse optimizer:

    y = table.weighted_sum(rows, weights)      autograd.WeightedSum, with the anchor as an input
    loss.backward()                            autograd.WeightedSum.backward:
                                                 the gradient of the weights, as usual;
                                                 table.collect(Read(rows, weights, upstream))
    optimizer.step()                           trainer/optim/rows/adam.py, which draws the rest

The anchor. GradScaler, clip_grad_norm_ and optimizers see only tensors with a `.grad`. In their
`param_groups` a hidden table is represented by its *anchor*, a tensor of two numbers whose gradient
we write ourselves. Each read adds 2^-40 (`ANCHOR_UNIT`) to the first number. Suppose three
micro-batches have each read the table once under a loss scale of 1024: the first number is
3 x 2^-40, while the row gradients are 1024 times too large. GradScaler.unscale_ now divides all
gradients by 1024, and what is left in the anchor is 3 x 2^-50. Divided by the 3 x 2^-40 that three
reads give, that is 1/1024: exactly the factor the collected row gradients still need, whoever
applied it, a scaler or clipping or both. 2^-40 is too small to change a gradient norm in which the
anchor takes part, and as a power of two it makes scaling exact. The second number is 0, or NaN if
a read had a gradient that is not finite: GradScaler then skips the step, as it should. A skipped
step leaves its reads behind, with a count that someone has scaled or cleared, and gradients of
parameters cleared: the next forward pass then throws the reads away. If parameters still have their
gradients, nobody has skipped the step, but clipped between micro-batches: then the reads take the
factor (`settle_reads`).
"""

import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import swa_utils

from memshard.models.kernels.backend import RowBackend, backend_for
from memshard.models.memory.host import to_device, to_host
from memshard.models.memory.huge_pages import prefer_huge_pages
from memshard.models.memory.row_gradient import Read

ANCHOR_UNIT = 2.0**-40
"""Added to the anchor's gradient per read. Negligible in a global gradient norm; a power of two, so
scaling it is exact.
"""


_MANY_READS = 1000
"""Far above the micro-batches of a step, times the layers that share a table."""

_COLLECTING = threading.Lock()
"""One for all tables, since a lock in a table could not be copied: a read and its count belong
together, and threads may train one model.
"""


class HideableTable(nn.Module):
    """The local part of a table, `weight` [rows, columns], which can be hidden.

    `weight` is an ordinary parameter until `hide`. Then it is a plain tensor that `parameters()`
    does not show, that `state_dict()`, `.to()` and `deepcopy` still carry, and whose gradient is
    collected as `reads`; `anchor` [2] represents it in optimizers.
    """

    weight: Tensor
    split: ClassVar[bool] = False
    """Whether several processes may have parts, so that FSDP may have the layer's weights."""
    backend: RowBackend
    """Reads and updates the rows; chosen wherever the table is placed on a device."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.host = False
        """Whether the table, once hidden, stays in host memory wherever the model goes; set before
        the model moves. Optimizer state stays in host memory as well, and the update runs there.
        Only the rows read and their gradients are transferred.
        """
        self.layer_learns = True
        """Whether the layer that reads next learns; see `requires_grad_`."""
        self.follows_layer = True
        """Whether a hidden table learns only as long as the layer that reads it does."""
        self.has_optimizer = False
        """Whether an optimizer takes the collected reads; `RowAdam` sets it. A copy of the table
        has none, since the optimizer does not know it.
        """
        self.spent_by: weakref.ref[Any] | None = None
        """The optimizer that took the last reads, until they are cleared or others come."""
        self.trained_beside: Sequence[Tensor] = ()
        """Parameters that the same CombinedOptimizer trains."""
        self.settled = False
        """Whether the layer that reads next has called `settle_reads`."""
        self.checks_anchor = True
        """Whether each pass asks the anchor what has been done to the gradient since the last, for
        which it waits for a GPU. The trainer, which scales no gradient between passes and forgets
        the reads of a skipped step, need not.
        """
        self.left_alone = False
        """Whether reads were collected although no optimizer would take them."""
        self.reads_asked = 0
        """Number of reads by this rank's tokens, in passes with gradients, since the collected
        gradient was last dropped.
        """
        self.weight = nn.Parameter(weight)
        self._choose_backend()

    @property
    def hidden(self) -> bool:
        """True once the table is out of `parameters()`."""
        # Not by `_parameters`: pruning, parametrizations and FSDP take the weight out as well.
        return "anchor" in self.__dict__

    @property
    def autograd_handle(self) -> Tensor:
        """The tensor autograd tracks for this table: the weight, or a hidden table's anchor.

        The anchor is detached if the layer that reads the table is frozen.
        """
        if not self.hidden:
            return self.weight
        frozen = self.follows_layer and not self.layer_learns
        return self.anchor.detach() if frozen else self.anchor

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let the table learn, or freeze it, whatever happens to its layer.

        Freezing a model does not see a hidden table. Without this call it learns only while the
        layer that reads it has a weight that needs a gradient; with it, it may learn alone.
        """
        super().requires_grad_(requires_grad)
        if self.hidden:
            self.anchor.requires_grad_(requires_grad)
            self.follows_layer = False
        return self

    def hide(self) -> None:
        """Take the table out of `parameters()`; if it is frozen, it stays so."""
        if not self.hidden:
            weight = self._parameters.get("weight")
            # FSDP2's and FSDP1's marks.
            if weight is None or any(
                hasattr(weight, x) for x in ("device_mesh", "_fsdp_flattened")
            ):
                raise ValueError(
                    "a table's values are no plain parameter any more: hide or split tables before "
                    "FSDP wraps the model, and before its values are parametrized or pruned"
                )
            if weight._backward_hooks or weight._post_accumulate_grad_hooks:
                raise ValueError(
                    "hooks on a table's values would not be called once it is hidden, as its "
                    "gradient is then no tensor: remove them, or do not hide the table"
                )
            # Unfrozen in a frozen layer, it learns alone.
            self.follows_layer = self.layer_learns or not self.weight.requires_grad
            # A table that was frozen together with its layer follows it from now on.
            learns = self.weight.requires_grad or not self.layer_learns
            values = self.weight.data
            # torch refuses a plain tensor under the name of a parameter, so
            # the parameter goes first.
            del self.weight
            self.set_values(values)
            self.anchor.requires_grad_(learns)
            _refuse_averages_without_tables()

    @contextmanager
    def as_parameter(self) -> Iterator[None]:
        """Show the values of a hidden table as a parameter, for code that reads or writes these."""
        shown = self.hidden and "weight" not in self._parameters
        if shown:
            values = self.weight
            del self.weight
            self.weight = nn.Parameter(values, requires_grad=False)
        try:
            yield
        finally:
            if shown:
                values = self.weight.data
                del self.weight
                self.weight = values

    def set_values(self, values: Tensor) -> None:
        """Make `values` [rows, columns] the content of a hidden table, without reads."""
        self.weight = values
        self.reads: list[Read] = []
        self.anchor = self._new_anchor().requires_grad_()
        self._choose_backend()

    def check_optimizer(self) -> None:
        """Raise RuntimeError if reads of an earlier pass wait for an optimizer in vain."""
        if self.reads and self.left_alone and not self.has_optimizer:
            raise RuntimeError(
                "a hidden table is trained, but no RowAdam was made for it, so it would never "
                "change: make one of what externalize_tables(model) returns, and step both "
                "optimizers, CombinedOptimizer(AdamW(model.parameters()), RowAdam(tables)); "
                "Hugging Face's Trainer takes it as optimizers=(optimizer, None). A copy of a "
                "table (deepcopy, PEFT's modules_to_save) is another table: call "
                "externalize_tables after copying. To keep the values as they are: "
                "table.requires_grad_(False)"
            )

    @torch.compiler.disable
    def settle_reads(self, weights: Sequence[Tensor] = ()) -> None:
        """Bring a factor on the collected gradient, as of clipping after each micro-batch, into the
        reads, or forget them if a skipped step has left them; before each pass. weights: of the
        layer that reads the table. RuntimeError if there is no telling.
        """
        with _COLLECTING:
            self.settled = True
            factor = self._factor()
            if factor != 1:
                self._scale_reads(factor if factor and self._gradients_wait(weights) else 0)

    def _gradients_wait(self, weights: Sequence[Tensor]) -> bool:
        """Return whether parameters still have the gradients that belong to the reads.

        After a skipped step whoever trains has cleared those that `parameters()` shows.
        """
        own = [x for x in weights if x.requires_grad]
        beside = [x for x in self.trained_beside if x.requires_grad]
        if _any_gradient(own):
            return True
        # FSDP shows a layer other tensors during a pass, without gradients.
        if own and not self.split:
            return False
        if _any_gradient(beside):
            return True
        # FSDP2 keeps gradients to itself that it was told not to reduce yet.
        if beside and not any(hasattr(x, "device_mesh") for x in beside):
            return False
        assert self.anchor.grad is not None
        if bool(self.anchor.grad[1].isnan()):
            return False  # a loss scaler's overflow
        raise RuntimeError(
            "a hidden table's gradient has been scaled since the last backward pass, and whether "
            "that step was skipped does not show, as other optimizers train the parameters or FSDP "
            "has not reduced their gradients: step all by one, CombinedOptimizer(AdamW(...), "
            "RowAdam(tables)), scale after the last micro-batch of a step, or call zero_grad() of "
            "RowAdam where a step is skipped"
        )

    def _factor(self) -> float:
        """Return what has scaled the collected gradient since backward; 0 if it was cleared."""
        if not (self.reads and self.checks_anchor):
            return 1.0
        if self.anchor.grad is None:
            return 0.0
        return float(self.anchor.grad[0]) / (len(self.reads) * ANCHOR_UNIT)

    def _scale_reads(self, factor: float) -> None:
        if factor == 0 or self.anchor.grad is None:
            self.drop_reads()
        else:
            self.reads = [replace(read, weights=read.weights * factor) for read in self.reads]
            self.anchor.grad[0] = len(self.reads) * ANCHOR_UNIT

    def collect(self, read: Read) -> None:
        """Keep a read's gradient for the optimizer, and count it in the anchor's gradient."""
        with _COLLECTING:
            self._collect(read)

    def _collect(self, read: Read) -> None:
        if self.anchor._backward_hooks or self.anchor._post_accumulate_grad_hooks:
            raise NotImplementedError(
                "hooks on what a RowAdam's param_groups hold would not be called, as a hidden "
                "table's gradient is no tensor of autograd's: register them on "
                "model.parameters(), and step RowAdam after backward()"
            )
        # Since the forward pass, which has settled what was there, someone has scaled or cleared.
        if (factor := self._factor()) != 1:
            self._scale_reads(factor)
        self.left_alone, self.spent_by = not self.has_optimizer, None
        self.reads.append(read)
        if len(self.reads) == _MANY_READS:
            warnings.warn(
                f"a hidden table has collected {_MANY_READS:,} reads since its RowAdam last "
                "stepped, and keeps them all: is that optimizer in the training loop?",
                stacklevel=1,
            )
        # The maximum makes one pass without temporaries, and it keeps NaN.
        largest = [
            torch.linalg.vector_norm(x, torch.inf)
            for x in (read.upstream, read.weights)
            if x.numel()
        ]
        # 0 for finite numbers, else NaN.
        finite = torch.stack(largest).mul(0).sum() if largest else self.anchor.new_zeros(())
        count = F.pad(finite.view(1).to(self.anchor), (1, 0), value=ANCHOR_UNIT)
        self.anchor.grad = count if self.anchor.grad is None else self.anchor.grad.add_(count)

    def drop_reads(self) -> None:
        """Forget the collected gradient."""
        self.reads.clear()
        self.reads_asked = 0
        self.anchor.grad = self.spent_by = None

    def to_table_device(self, *tensors: Tensor) -> list[Tensor]:
        """Move the tensors to the device that stores the table."""
        return to_host(*tensors) if self.host and self.hidden else list(tensors)

    def rows_at(self, rows: Tensor) -> Tensor:
        """Return weight[rows] on the device of `rows` [n]."""
        (local,) = self.to_table_device(rows)
        out = self.weight.new_empty(
            len(local), self.weight.shape[1], pin_memory=rows.is_cuda and not local.is_cuda
        )
        return to_device(torch.index_select(self.weight, 0, local, out=out), rows.device)

    def collect_row_gradients(self, rows: Tensor, gradients: Tensor) -> None:
        """Collect gradients [n, columns] of some rows [n], each as a read of weight 1."""
        rows, gradients = self.to_table_device(rows, gradients)
        numbers = torch.arange(len(rows), device=rows.device)
        self.collect(Read(rows, gradients.new_ones(len(rows)), numbers, gradients))

    def _choose_backend(self) -> None:
        self.backend, _ = backend_for(self.weight.device)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        if self.hidden:
            self.weight = prefer_huge_pages(self._to_host(fn) if self.host else fn(self.weight))
            self._place_anchor()
        self._choose_backend()
        return self

    def _to_host(self, fn):  # type: ignore[no-untyped-def]
        like = fn(self.weight[:0])  # follows the dtype, not the device
        if self.weight.is_meta:
            return torch.empty(
                self.weight.shape, dtype=like.dtype, device="meta" if like.is_meta else "cpu"
            )
        return self.weight.to("cpu", like.dtype)

    def _new_anchor(self) -> Tensor:
        # Optimizers cast their state to this dtype when they load it.
        return torch.zeros(
            2,
            dtype=torch.promote_types(self.weight.dtype, torch.float32),
            device=self.weight.device,
        )

    def _place_anchor(self) -> None:
        if self.anchor.is_meta:
            self.anchor = self._new_anchor().requires_grad_(self.anchor.requires_grad)
        else:
            # An optimizer may know the table by its anchor, so that stays the same object.
            gradient, self.anchor.grad = self.anchor.grad, None
            self.anchor.data = self._new_anchor()
            self.anchor.grad = None if gradient is None else gradient.to(self.anchor)

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.hidden:
            destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        # A parameter while it loads: torch's own checks then serve hidden tables as well.
        with self.as_parameter():
            super()._load_from_state_dict(
                state_dict, prefix, metadata, strict, missing, unexpected, errors
            )
        if self.hidden:
            self._place_anchor()
        self._choose_backend()

    def __getstate__(self) -> dict[str, Any]:
        # Loaded libraries cannot be copied or pickled, and a copy may wake up on another device.
        # Gradients stay behind, as a parameter's do.
        left_out = ("backend", "reads", "spent_by", "trained_beside")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.has_optimizer = self.left_alone = False
        self.spent_by, self.trained_beside = None, ()
        if self.hidden:
            self.reads = []
            self.drop_reads()
        self._choose_backend()


def _any_gradient(weights: Iterable[Tensor]) -> bool:
    # Of a DTensor this rank's part: others may not ask at this time.
    gradients = [getattr(x.grad, "_local_tensor", x.grad) for x in weights if x.grad is not None]
    return any(bool(gradient.any()) for gradient in gradients)


@cache
def _refuse_averages_without_tables() -> None:
    """From now on raise ValueError when torch's `AveragedModel` takes in a hidden table.

    It would leave the table at the values of the first day, since it averages what `parameters()`
    and `buffers()` show; no code of ours runs when it does. Lightning's callbacks use it as well.
    """

    def refuse(module: nn.Module, name: str, part: nn.Module | None) -> None:
        if (
            isinstance(module, swa_utils.AveragedModel)
            and part is not None
            and type(module).update_parameters is swa_utils.AveragedModel.update_parameters
            and any(isinstance(table, HideableTable) and table.hidden for table in part.modules())
        ):
            raise ValueError(
                "torch's AveragedModel does not see hidden tables and would leave them as they "
                "are: use memshard.AveragedModel, which takes the same arguments"
            )

    register_module_module_registration_hook(refuse)
