"""This process as one rank of many, whose collectives copy what it sends itself."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import nn

from memshard.parallel.compat import init_fake_group
from memshard.trainer.engine import native
from memshard.trainer.run import Run


class _Unexchanged(nn.Module):
    """In place of DistributedDataParallel, whose reducer works below what can be watched."""

    def __init__(self, module: nn.Module, **_: Any) -> None:
        super().__init__()
        self.module = module

    def register_comm_hook(self, *_: Any) -> None:
        """Nothing is exchanged."""

    def no_sync(self) -> Any:
        return nullcontext()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Be rank 0 of so many in the block. Dense gradients are not exchanged, and copies are not
    compared.
    """
    assert init_fake_group(0, ranks)
    new_group = dist.new_group
    replaced = dist.new_group, native.DistributedDataParallel, Run.check_copies
    dist.new_group = lambda *args, backend=None, **kwargs: new_group(*args, **kwargs)
    native.DistributedDataParallel, Run.check_copies = _Unexchanged, lambda _: None
    try:
        yield
    finally:
        dist.new_group, native.DistributedDataParallel, Run.check_copies = replaced
        dist.destroy_process_group()
