"""The dense half of a step on plain torch: DDP, accumulation, gradient norm, update, ZeRO-1."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from memshard.parallel.compat import without_buffer_broadcasts
from memshard.parallel.grad_norm import complete_gradients, gradient_norm
from memshard.parallel.mesh import DATA, group
from memshard.parallel.spec import ShardSpec
from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.optim.dense.build import build_dense_optimizer, make_states, owners
from memshard.trainer.optim.dense.kinds import DENSE_KINDS

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimizer of this rank's share of the dense parameters."""


class NativeEngine:
    """Trains the dense parameters of a model whose tables are hidden. The losses of all ranks and
    micro-batches must add up to the batch's loss.

    shard_states: ZeRO stage 1 (Rajbhandari et al. 2020, section 5). Each rank keeps the optimizer's
    states of some parameters, updates those and broadcasts them. Parameters are not cut, so the
    update is the same to the last bit and a checkpoint needs no gathering.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig | MakeOptimizer,
        mesh: DeviceMesh | None,
        placement: Mapping[str, ShardSpec],
        shard_states: bool = False,
    ) -> None:
        self.mesh, self.placement = mesh, placement
        self.model: nn.Module = model
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.owners = [0] * len(self.parameters)
        self.local = self.parameters  # those whose states this rank keeps
        self.data = None if mesh is None else group(mesh, DATA)
        copies = dist.get_world_size(self.data) if self.data else 1
        if copies > 1:
            # Buffers are query statistics, which the ranks sum in QueryNorm.
            self.model = DistributedDataParallel(
                model,
                process_group=self.data,
                gradient_as_bucket_view=True,
                **without_buffer_broadcasts(),
            )
            self.model.register_comm_hook(self.data, _sum_gradients)
            if shard_states:
                self.owners = owners([p.numel() for p in self.parameters], copies)
                pairs = zip(self.parameters, self.owners, strict=True)
                # Whole parameters, by a deal that balances their sizes.
                self.local = [p for p, owner in pairs if owner == dist.get_rank(self.data)]
        self.shares_updates = copies > 1 and shard_states
        if isinstance(config, OptimizerConfig):
            self.optimizer = build_dense_optimizer(self.local, config)
            make_states(self.optimizer, DENSE_KINDS[config.kind], self.local)
        else:
            self.optimizer = config(self.local)

    def forward_context(self, last: bool) -> Any:
        """Return the context for a micro-batch's forward and backward, in which ranks exchange
        gradients if it is the step's last one.
        """
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def backward(self, loss: Tensor, scale: float) -> None:
        """Add the gradients of a micro-batch, times `scale`."""
        (loss * scale).backward()

    def gradient_norm(self, scale: float) -> Tensor:
        """Return the global 2-norm of the dense gradient, without `scale`; the same on all ranks.

        Call it exactly once a step, after its backwards: it also sums over the tensor axis what
        backward leaves partial.
        """
        complete_gradients(self.named, self.placement, self.mesh)
        return gradient_norm(self.named, self.placement, self.mesh) / scale

    def step(self, rate: float, norm: Tensor, clip: float, scale: float) -> None:
        """Divide the gradients by `scale`, clip them to norm `clip` (0: do not), update with
        learning rate `rate`, and clear them.
        """
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        gradients = [p.grad for p in self.local if p.grad is not None]
        if scale != 1 and gradients:
            # On a GPU one kernel for many tensors, where a loop would launch one for each.
            torch._foreach_mul_(gradients, 1 / scale)
        if clip:
            # The norm is that of all parameters, so each rank scales its share by the same factor.
            nn.utils.clip_grads_with_norm_(self.local, clip, norm)
        self.optimizer.step()
        if self.shares_updates:
            pairs = zip(self.parameters, self.owners, strict=True)
            broadcasts = [
                dist.broadcast(p.data, group=self.data, group_src=owner, async_op=True)
                for p, owner in pairs
            ]
            for work in broadcasts:  # all at once, then wait: latencies overlap
                assert work is not None
                work.wait()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients."""
        for p in self.parameters:
            p.grad = None

    def state(self, tensors: dict[str, Tensor], everywhere: bool = False) -> dict[str, Tensor]:
        """Return a checkpoint's tensors unchanged: all are in the model and in `optimizer`."""
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Do nothing: the tensors of `state` that a checkpoint was loaded into are the engine's."""

    def write_settings(self, folder: Path) -> None:
        """Do nothing: the recipe says it all."""


def _sum_gradients(
    data: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over the ranks; DDP's default averages them."""
    work = dist.all_reduce(bucket.buffer(), group=data, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
