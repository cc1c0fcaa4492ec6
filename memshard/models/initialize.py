"""Initial weights that depend on (seed, name of the module) alone."""

import zlib

import torch
from torch import nn

from memshard.models.random import fold


def initialize(model: nn.Module, seed: int) -> None:
    """Call `reset_parameters` of every module that has one, after seeding torch by its name.

    A model with a memory and one without therefore start from the same trunk, and a table's shards
    (drawn by row number) agree on any number of ranks. Dense draws come from the generator of the
    model's device, so a GPU and a CPU start from different weights.
    """
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    for name, module in model.named_modules():
        if hasattr(module, "reset_parameters"):
            # The caller's generator stays where it was.
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(fold(seed, zlib.crc32(name.encode())) & (1 << 62) - 1)
                module.reset_parameters()
