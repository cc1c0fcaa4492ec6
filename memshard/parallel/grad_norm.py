"""Gradients of spread parameters: completed, and their global norm."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from memshard.parallel.mesh import tensor_size
from memshard.parallel.spec import ShardSpec


def complete_gradients(
    parameters: Mapping[str, nn.Parameter],
    placement: Mapping[str, ShardSpec],
    mesh: DeviceMesh | None,
) -> None:
    """Sum over the tensor axis the gradients of parameters that it does not split: each rank knows
    the part of its tokens.

    To be called once a step, before or after the sum over the data axes. All ranks must have the
    same gradients.
    """
    if tensor_size(mesh) == 1:
        return
    assert mesh is not None
    parts = [
        p.grad for name, p in parameters.items() if name not in placement and p.grad is not None
    ]
    if not parts:
        return
    total = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(total, group=mesh["tensor"].get_group())
    for part, piece in zip(parts, total.split([part.numel() for part in parts]), strict=True):
        part.copy_(piece.view_as(part))


def gradient_norm(
    parameters: Mapping[str, nn.Parameter],
    placement: Mapping[str, ShardSpec],
    mesh: DeviceMesh | None,
) -> Tensor:
    """2-norm of complete gradients, every element counted once however it is spread; the same on
    all ranks.
    """
    found = [(name in placement, p.grad) for name, p in parameters.items() if p.grad is not None]
    copied = nn.utils.get_total_norm([gradient for is_split, gradient in found if not is_split])
    if tensor_size(mesh) == 1:
        return copied
    assert mesh is not None
    split = nn.utils.get_total_norm([gradient for is_split, gradient in found if is_split]).square()
    dist.all_reduce(split, group=mesh["tensor"].get_group())
    return (copied.square() + split).sqrt()
