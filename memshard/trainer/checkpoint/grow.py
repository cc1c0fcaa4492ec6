"""Load a product-key memory from a checkpoint that has fewer keys."""

import math
from pathlib import Path

import torch
from torch import Size, Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_dtensor

from memshard.models.memory.product_key import row_slots, slot_rows
from memshard.models.memory.table import ValueTable
from memshard.trainer.checkpoint.save_load import load_tensors

_BLOCK_ROWS = 4096
_NEW_KEY_LENGTH = 0.5
"""New sub-keys get half the typical length of the old ones of their head and half. With 512 scores
the 32nd best is about 1.5 standard deviations above the mean; a key of half the length in a random
direction exceeds that for one token in 1,000. So tokens keep reading the slots they have read, and
new sub-keys are still selected sometimes.
"""


def grow_table(
    checkpoint: Path, source: str, saved: Size, tensor: Tensor, table: ValueTable, zero_new: bool
) -> None:
    """Fill the values, moments or another per-row state of a table: slot (i1, i2) moves to its row
    on the diagonal of the larger table. All ranks call it.

    tensor: [slots, ...], of global shape. saved: the shape of `source` in the checkpoint. zero_new:
    set the other slots to 0; otherwise they stay. This rank's shard of the source
    is in memory meanwhile.
    """
    old, new = _empty_like_saved(tensor, saved), local_part(tensor)
    load_tensors(checkpoint, {source: old})
    keys, old_keys = math.isqrt(table.slots), math.isqrt(saved[0])
    # As many rounds on every rank: gather_rows is a collective, and a rank with fewer rows joins
    # with none.
    for first in range(0, table.max_local_rows, _BLOCK_ROWS):
        local = torch.arange(
            min(first, len(new)), min(first + _BLOCK_ROWS, len(new)), device=new.device
        )
        slots = row_slots(local + table.first_row, keys)
        i1, i2 = slots // keys, slots % keys
        kept = (i1 < old_keys) & (i2 < old_keys)
        if zero_new:
            new[local] = 0
        new[local[kept]] = table.gather_rows(
            local_part(old), slot_rows(i1[kept], i2[kept], old_keys), saved[0]
        )


def grow_sub_keys(
    checkpoint: Path, source: str, saved: Size, tensor: Tensor, shorten: bool
) -> None:
    """Fill sub-keys or their moments, [heads, 2, keys, half]: the first keys from the checkpoint.
    shorten: scale the others, which were drawn, to half the typical length of the first.
    """
    old, new = _empty_like_saved(tensor, saved), local_part(tensor)
    # Alone, because with ZeRO a moment is on one rank only.
    load_tensors(checkpoint, {source: old}, alone=True)
    before = local_part(old)
    if shorten:
        drawn = new[:, :, saved[2] :]
        drawn *= _NEW_KEY_LENGTH * _rms(before) / _rms(drawn)
    new[:, :, : saved[2]] = before


def _empty_like_saved(tensor: Tensor, saved: Size) -> Tensor:
    """Return an empty tensor of the saved shape, split over ranks as `tensor` is."""
    if isinstance(tensor, DTensor):
        return empty_dtensor(
            saved, dtype=tensor.dtype, device_mesh=tensor.device_mesh, placements=tensor.placements
        )
    return torch.empty(saved, dtype=tensor.dtype, device=tensor.device)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor of global shape."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rms(sub_keys: Tensor) -> Tensor:
    """Return the root mean square for each head and half, [heads, 2, 1, 1]."""
    return sub_keys.square().mean((2, 3), keepdim=True).sqrt()
