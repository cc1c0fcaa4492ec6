"""A check that copies of a tensor on several ranks are equal to the last bit."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from memshard.parallel.spec import ShardSpec

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_copies(
    tensors: Mapping[str, Tensor], placement: Mapping[str, ShardSpec], mesh: DeviceMesh | None
) -> None:
    """Raise RuntimeError, on every rank, if a tensor differs in any bit from its copies on others.

    tensors: this rank's, by the same names on all ranks; a tensor that `placement` splits over some
    mesh axes is compared along the others only. Costs one all-gather of 8 bytes a tensor.
    """
    if mesh is None:
        return
    # Sorted: dicts of different ranks may list the same names in another order.
    names = sorted(tensors)
    # Tables may be in host memory.
    sums = torch.stack([_bit_sum(tensors[name]).to(mesh.device_type) for name in names])
    everywhere = sums.new_empty(dist.get_world_size() * len(names))
    dist.all_gather_single(everywhere, sums)
    by_place = everywhere.view(-1, len(names)).cpu()[mesh.mesh.cpu()]  # [*mesh, names]
    for number, name in enumerate(names):
        spec = placement.get(name)
        copies = by_place[..., number]
        for axis, axis_name in enumerate(mesh.mesh_dim_names or ()):
            if spec is not None and axis_name in spec.axes:
                continue
            different = (copies != copies.narrow(axis, 0, 1)).nonzero()
            if len(different):
                place = tuple(different[0].tolist())
                first = (*place[:axis], 0, *place[axis + 1 :])
                raise RuntimeError(
                    f"{name} on rank {int(mesh.mesh[place])} is not the copy of rank "
                    f"{int(mesh.mesh[first])}'s that it should be: ranks "
                    "that hold the same weights have drifted apart; resume the last checkpoint, "
                    "and if it happens again report the setting"
                )


def _bit_sum(x: Tensor) -> Tensor:
    """Return the sum of the bit patterns of a tensor's elements as integers, modulo 2^64.

    Unlike a sum of floats it does not depend on the order of addition.
    """
    x = x.detach().contiguous()
    return x.view(_BITS[x.element_size()]).sum(dtype=torch.int64)
