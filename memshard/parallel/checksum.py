"""A check that copies of a tensor on several ranks are equal to the last bit."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def check_copies(tensors: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError, on every rank, if a tensor differs in any bit from its copies on others.
    All ranks call it.

    tensors: this rank's, as a checkpoint has them: of a DTensor the local shard is compared with
    those of the same place, any other tensor with all of its name. A rank may lack some. Each
    tensor with copies is read once, and its name and 8 bytes are sent to all.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    parts, sums = [], []
    for name, tensor in tensors.items():
        place: tuple[int, ...] = ()
        local = tensor
        if isinstance(tensor, DTensor):
            if tensor.device_mesh.size() == dist.get_world_size():
                continue  # a shard on every rank: nobody has a copy, and tables are large
            place, local = tuple(tensor.device_mesh.get_coordinate() or ()), tensor.to_local()
        parts.append((name, place))
        sums.append(_bit_sum(local))
    # On one device, whatever is in host memory, to wait for it once.
    numbers = torch.stack([value.to(sums[0].device) for value in sums]).tolist() if sums else []
    everywhere: list[dict[tuple[str, tuple[int, ...]], int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, dict(zip(parts, numbers, strict=True)))
    for part in dict.fromkeys(part for held in everywhere for part in held):
        first, *others = [
            (rank, held[part]) for rank, held in enumerate(everywhere) if part in held
        ]
        if drifted := [str(rank) for rank, bits in others if bits != first[1]]:
            raise RuntimeError(
                f"{part[0].removeprefix('model.')} on rank {', '.join(drifted)} is not the copy of "
                f"rank {first[0]}'s that it should be: ranks that hold the same weights have "
                "drifted apart, and no checkpoint is written; resume the last one, and if it "
                "happens again report the setting"
            )


def _bit_sum(x: Tensor) -> Tensor:
    """Return the sum of the bits of a tensor as integers of 64 bits, modulo 2^64.

    Unlike a sum of floats it does not depend on the order of addition. Of 8 bytes at a time: sums
    of smaller integers make a copy of them in 64 bits, and take 4 to 20 times as long.
    """
    data = x.detach().contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = len(data) // 8 * 8
    return data[:whole].view(torch.int64).sum() + data[whole:].sum()
