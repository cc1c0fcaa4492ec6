"""Load a memory that was saved with fewer keys."""

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
"""Of the old sub-keys of the same head and half. The 32nd best of 512 scores stands at 1.5 standard
deviations: a key in a random direction and of half the length reaches it once in 1,000 tokens.
So tokens go on reading what they have read, and new sub-keys are still found.
"""


def grow_table(
    checkpoint: Path, source: str, saved: Size, tensor: Tensor, table: ValueTable, zero_new: bool
) -> None:
    """Fill values, moments or whatever else a table has by row: slot (i1, i2) moves to the row of
    its new diagonal.

    tensor: as checkpoints know it, [slots, ...]; saved: the shape of `source`. zero_new: the other
    slots get 0; else they keep what they have. The whole source, or this rank's part of it, is held
    meanwhile. All ranks take part.
    """
    old, new = _empty_like_saved(tensor, saved), local_part(tensor)
    load_tensors(checkpoint, {source: old})
    keys, old_keys = math.isqrt(table.slots), math.isqrt(saved[0])
    for first in range(0, table.max_local_rows, _BLOCK_ROWS):
        here = torch.arange(
            min(first, len(new)), min(first + _BLOCK_ROWS, len(new)), device=new.device
        )
        slots = row_slots(here + table.first_row, keys)
        i1, i2 = slots // keys, slots % keys
        kept = (i1 < old_keys) & (i2 < old_keys)
        if zero_new:
            new[here] = 0
        new[here[kept]] = table.gather_rows(
            local_part(old), slot_rows(i1[kept], i2[kept], old_keys), saved[0]
        )


def grow_sub_keys(
    checkpoint: Path, source: str, saved: Size, tensor: Tensor, shorten: bool
) -> None:
    """Fill sub-keys or their moments, [heads, 2, keys, half]: the first ones from the checkpoint.
    shorten: the others, as drawn, to a share of their length.
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
    """Room for a tensor of the saved shape, spread over ranks as `tensor` is."""
    if isinstance(tensor, DTensor):
        return empty_dtensor(
            saved, dtype=tensor.dtype, device_mesh=tensor.device_mesh, placements=tensor.placements
        )
    return torch.empty(saved, dtype=tensor.dtype, device=tensor.device)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor as checkpoints know it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rms(sub_keys: Tensor) -> Tensor:
    """Of each head and half, [heads, 2, 1, 1]."""
    return sub_keys.square().mean((2, 3), keepdim=True).sqrt()
