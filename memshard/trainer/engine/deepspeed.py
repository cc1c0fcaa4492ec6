"""The dense half of a step on DeepSpeed: ZeRO-0 to 2, offload, 16-bit parameters with fp32 masters.

The only file that imports DeepSpeed.
"""

import json
import logging
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from memshard.parallel.collectives import all_sum
from memshard.parallel.grad_norm import gradient_norm
from memshard.parallel.mesh import DATA, group, tensor_size
from memshard.parallel.spec import ShardSpec
from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.dense_bytes import BUCKET
from memshard.trainer.optim.dense.build import build_dense_optimizer, make_states, owners
from memshard.trainer.optim.dense.kinds import DENSE_KINDS


class DeepSpeedEngine:
    """Trains the dense parameters of a model whose tables are hidden, with `NativeEngine`'s
    interface and results.

    Under fp16 and bf16 the parameters are 16-bit and the optimizer keeps fp32 masters; checkpoints
    hold the masters. With ZeRO, DeepSpeed flattens the parameters and cuts the result into
    partitions, one a rank, with their masters and optimizer states (`self.zero`).
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        settings: TrainConfig,
        mesh: DeviceMesh | None,
        placement: Mapping[str, ShardSpec],
        dtype: torch.dtype,
    ) -> None:
        """dtype: of the arithmetic. ValueError if DeepSpeed is missing or cannot do it right."""
        _check_precision(settings, dtype)
        self.config, self.kind = config, DENSE_KINDS[config.kind]
        self.mesh, self.placement = mesh, placement
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.shards = settings.zero > 0
        self.broken = False
        device = self.parameters[0].device
        deepspeed = _import(device)
        _begin_process_group(device)
        self.data = dist.group.WORLD if mesh is None else group(mesh, DATA)
        for name, p in self.named.items():
            p.model_parallel = name in placement  # type: ignore[attr-defined]  # for its norm
        exact = []
        if dtype != torch.float32:
            # Before DeepSpeed rounds them to 16 bits; on the host, where they
            # cost no device memory.
            exact = [p.detach().cpu() for p in self.parameters]
            _compute_in(dtype, model, device)
        self.optimizer: Any = build_dense_optimizer(self.parameters, config)
        self.json = _json(settings, dtype, self.parameters, dist.get_world_size(self.data))
        self.engine, self.zero, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=self.json,
            mpu=None if mesh is None else _mpu(mesh),
            dist_init_required=False,
        )
        self.model: nn.Module = self.engine
        self._sum_over_tensor_axis()
        if self.shards:
            self._decide_overflow()
            self._set_masters(exact)
            make_states(self.zero.optimizer, self.kind, self.zero.single_partition_of_fp32_groups)
            self.zero._lazy_init_hp_params_optimizer_state()
        else:
            make_states(self.optimizer, self.kind, self.parameters)

    def _sum_over_tensor_axis(self) -> None:
        """Sum the gradients of replicated parameters over the tensor axis in each backward:
        DeepSpeed expects Megatron's layers, which leave those equal on all its ranks.

        Call it after `deepspeed.initialize`: a parameter that is cast gets a new accumulator, and
        the hooks of the old one are never called.
        """
        self.accumulators = []  # autograd forgets a hooked node that nothing refers to
        if tensor_size(self.mesh) == 1:
            return
        assert self.mesh is not None
        axis = self.mesh.get_group("tensor")
        for name, p in self.named.items():
            if name not in self.placement:
                # A hook on the parameter would also see the gradients that a reversible block takes
                # inside its backward.
                accumulator: Any = torch.autograd.graph.get_gradient_edge(p).node
                accumulator.register_prehook(lambda gradients: (all_sum(gradients[0], axis),))
                self.accumulators.append(accumulator)

    def _decide_overflow(self) -> None:
        """Take the verdict on overflow away from DeepSpeed: the trainer reaches one for dense
        parameters and tables together before it steps, so here a step overflows only if `broken`.
        """
        self.zero.check_grad_overflow = True
        self.zero.check_overflow = lambda *_, **__: setattr(self.zero, "overflow", self.broken)

    def _set_masters(self, exact: list[Tensor]) -> None:
        """Give DeepSpeed the fp32 weights: its masters are copies of 16-bit ones, which have lost
        half of the digits. exact: empty in fp32.
        """
        for p, value in zip(self.parameters, exact, strict=False):
            _set(p, value.to(self.zero.device))

    def forward_context(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context for a micro-batch's forward and backward, in which ranks exchange
        gradients if it is the step's last one, with ZeRO-2 always.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, scale: float) -> None:
        """Add the gradients of a micro-batch, times `scale`."""
        if self.shards:
            self.zero.override_loss_scale(scale)
        else:
            loss = loss * scale
        self.engine.backward(loss, scale_wrt_gas=False)

    def gradient_norm(self, scale: float) -> Tensor:
        """Return the global 2-norm of the dense gradient, without `scale`; the same on all ranks,
        and infinite if it is not finite.
        """
        if not self.shards:
            return gradient_norm(self.named, self.placement, self.mesh) / scale
        norm = self.zero.scaled_global_norm().to(self.parameters[0].device)
        return torch.where(norm < 0, torch.inf, norm / scale)  # DeepSpeed says -1 on overflow

    def step(self, rate: float, norm: Tensor, clip: float, scale: float) -> None:
        """Divide the gradients by `scale`, clip them to norm `clip` (0: do not), update with
        learning rate `rate`, and clear them.
        """
        for parameters in self.zero.param_groups:
            parameters["lr"] = rate
        if self.shards:
            self.zero.clip_grad = clip
        else:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            if scale != 1:
                torch._foreach_mul_(gradients, 1 / scale)
            if clip:
                nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
        self.engine.step()
        assert self.engine.was_step_applied()

    def clear(self) -> None:
        """Drop the gradients."""
        if self.shards:
            # Only DeepSpeed knows where they are; an overflow makes it drop them.
            self.broken = True
            self.engine.step()
            self.broken = False
        else:
            self.engine.zero_grad()

    def state(self, tensors: dict[str, Tensor], everywhere: bool = False) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, with the masters and states that DeepSpeed keeps: each on
        one of the ranks that share a batch, or on all of them (`everywhere`). Collective.
        """
        if not self.shards:
            return tensors
        tensors = dict(tensors)
        for (name, p), owner in self._owned():
            arrays = {
                f"{key or 'model'}.{name}": p.get_full_hp_param(key) for key in self._arrays(p)
            }
            # One rank writes a parameter and its moments; which one changes from parameter to
            # parameter, so that all ranks write about as much.
            like = tensors.pop(f"model.{name}")
            if everywhere or owner == dist.get_rank(self.data):
                tensors |= {key: _like(like, value) for key, value in arrays.items()}
                tensors |= {f"{key}.{name}": count.clone() for key, count in self._counts().items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Give DeepSpeed the tensors of `state` that a checkpoint was loaded into. Collective."""
        if not self.shards:
            return
        counts: dict[str, Tensor] = {}
        for (name, p), owner in self._owned():
            for key in self._arrays(p):
                loaded = tensors.get(f"{key or 'model'}.{name}")
                value = torch.empty_like(p, dtype=torch.float32) if loaded is None else loaded
                value = value.to_local() if isinstance(value, DTensor) else value
                dist.broadcast(value, group=self.data, group_src=owner)
                _set(p, value, key)
                if key is None:
                    p.data.copy_(value)
            for key, count in self._counts().items():
                counts[key] = tensors.get(f"{key}.{name}", count.clone())
                dist.broadcast(counts[key], group=self.data, group_src=owner)
        for flat in self.zero.single_partition_of_fp32_groups:
            for key, count in counts.items():
                self.zero.state[flat][key].copy_(count)

    def _owned(self) -> Any:
        """Return ((name, parameter), rank of `data` that keeps it for a checkpoint) pairs."""
        return zip(
            self.named.items(),
            owners([p.numel() for p in self.parameters], dist.get_world_size(self.data)),
            strict=True,
        )

    def _arrays(self, p: Tensor) -> tuple[str | None, ...]:
        """Return DeepSpeed's names of the arrays kept for a parameter; None is its master."""
        return (None, *self.kind.moments(tuple(p.shape)))

    def _counts(self) -> dict[str, Tensor]:
        """Return the optimizer's counts, which are the same for every partition."""
        state = self.zero.state[self.zero.single_partition_of_fp32_groups[0]]
        return {name: state[name] for name in self.kind.counts}

    def write_settings(self, folder: Path) -> None:
        """Write DeepSpeed's settings into the run's folder, for people."""
        (folder / "deepspeed.json").write_text(
            json.dumps(self.json, indent=1) + "\n", encoding="utf-8"
        )


def _like(whole: Tensor, local: Tensor) -> Tensor:
    """Return the shard `local` as a tensor spread over ranks as `whole` is."""
    if not isinstance(whole, DTensor):
        return local
    return DTensor.from_local(
        local,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _set(p: Tensor, value: Tensor, key: str | None = None) -> None:
    """Set a parameter's master, or the moment `key`, on whichever ranks have a part of it."""
    p.set_full_hp_param(value, key)  # type: ignore[attr-defined]


def _json(
    settings: TrainConfig, dtype: torch.dtype, parameters: Sequence[Tensor], ranks: int
) -> dict[str, Any]:
    """Return DeepSpeed's configuration. ranks: number of those that share a batch."""
    share = -(-settings.batch // ranks)
    bucket = min(BUCKET, sum(p.numel() for p in parameters)) // 2 * 2  # it must be even
    zero: dict[str, Any] = {
        "stage": settings.zero,
        "overlap_comm": not settings.offload and torch.cuda.is_available(),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and not used
        "gradient_accumulation_steps": -(-share // (settings.micro_batch or share)),
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # it knows a few classes; our tests know ours
        "steps_per_print": None,
        "fp16": {"enabled": dtype == torch.float16, "loss_scale": 1.0},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def _check_precision(settings: TrainConfig, dtype: torch.dtype) -> None:
    if settings.zero == 0 and dtype != torch.float32:
        # 0.19.8 divides fp16 gradients by a scale that it never gave the loss, and counts one
        # bf16 step too many.
        raise ValueError(
            "train.zero is 0, where DeepSpeed is wrong in 16-bit arithmetic: set "
            "train.zero=1, or train.precision=fp32"
        )


def _begin_process_group(device: torch.device) -> None:
    """Begin one of this process alone, unless there is one: DeepSpeed does not work without."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )


def _import(device: torch.device) -> ModuleType:
    """Import DeepSpeed and keep it from logging, from standard output, and from compiling its
    collectives for the CPU (which takes a minute and a compiler).
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
        from deepspeed.runtime import torch_autocast
    except ImportError as error:
        raise ValueError(
            f"train.engine is deepspeed, which cannot be imported ({error}): pip install "
            "'memshard[deepspeed]'"
        ) from error
    for handler in deepspeed.logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    deepspeed.logger.setLevel(logging.WARNING)
    # Its own use of deprecated collectives.
    warnings.filterwarnings("ignore", "`?torch.distributed.*deprecated", FutureWarning)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    # It ends our autocast, with a warning; the model begins it again.
    torch_autocast._WARNED_NESTED_AUTOCAST = True
    return deepspeed


def _compute_in(dtype: torch.dtype, model: nn.Module, device: torch.device) -> None:
    """Make a model whose parameters become 16-bit compute as under autocast, with the residual
    stream and norms in fp32.
    """
    for module in model.modules():
        if hasattr(module, "embedding_dim"):  # fairscale's is not an nn.Embedding
            module.register_forward_hook(lambda _, __, x: x.float())
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.forward = partial(_wide_norm, module)  # type: ignore[method-assign]
    model.forward = torch.autocast(device.type, dtype)(model.forward)


def _wide_norm(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    function: Any = F.layer_norm if isinstance(norm, nn.LayerNorm) else F.rms_norm
    weights = (p.float() for p in norm.parameters(recurse=False))
    return function(x.float(), norm.normalized_shape, *weights, eps=norm.eps)


def _mpu(mesh: DeviceMesh) -> SimpleNamespace:
    """Return the mesh under the names by which DeepSpeed asks for it: Megatron's, old and new."""
    data, tensor = group(mesh, DATA), mesh.get_group("tensor")
    functions: dict[str, Any] = {}
    for name, ranks in (
        ("data_parallel", data),
        ("model_parallel", tensor),
        ("tensor_model_parallel", tensor),
    ):
        functions[f"get_{name}_group"] = lambda ranks=ranks: ranks
        functions[f"get_{name}_rank"] = partial(dist.get_rank, ranks)
        functions[f"get_{name}_world_size"] = partial(dist.get_world_size, ranks)
    return SimpleNamespace(**functions)
