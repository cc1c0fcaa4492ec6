"""Sums of gradients over the tensor axis, and the norm of all gradients over all ranks."""

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
    """Sum over the tensor axis the gradients of parameters that it does not split, since each rank
    computed them from its own tokens of the sequence.

    Call it once a step, before or after the sum over the data axes. Which parameters have gradients
    must be the same on all ranks.
    """
    if tensor_size(mesh) == 1:
        return
    assert mesh is not None
    gradients = [
        p.grad for name, p in parameters.items() if name not in placement and p.grad is not None
    ]
    if not gradients:
        return
    # One all-reduce for all of them: most are norms and biases of a few hundred values.
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=mesh["tensor"].get_group())
    sums = flat.split([gradient.numel() for gradient in gradients])
    for gradient, total in zip(gradients, sums, strict=True):
        gradient.copy_(total.view_as(gradient))


def gradient_norm(
    parameters: Mapping[str, nn.Parameter],
    placement: Mapping[str, ShardSpec],
    mesh: DeviceMesh | None,
) -> Tensor:
    """Return the 2-norm of all gradients, the same on all ranks. Every element counts once, whether
    it is split or copied. Call it after `complete_gradients` and the sum over the data axes.
    """
    gradients = [
        (name in placement, p.grad) for name, p in parameters.items() if p.grad is not None
    ]
    # Copies are the same on all ranks, so this norm needs no exchange.
    copied = _norm([gradient for is_split, gradient in gradients if not is_split], parameters)
    if tensor_size(mesh) == 1:
        return copied
    assert mesh is not None
    local = _norm([gradient for is_split, gradient in gradients if is_split], parameters)
    split = local.square()
    dist.all_reduce(split, group=mesh["tensor"].get_group())
    # Norms of disjoint sets add by their squares; the all-reduce is of one number.
    return (copied.square() + split).sqrt()


def _norm(gradients: list[Tensor], parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Return the 2-norm of the gradients together, on the parameters' device."""
    if gradients:
        return nn.utils.get_total_norm(gradients)
    # torch's of none is on the CPU, from where a GPU's group would not take it.
    return torch.zeros((), device=next((p.device for p in parameters.values()), None))
