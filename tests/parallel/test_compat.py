"""Names of torch.distributed that releases before 2.13 do not have."""

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from memshard.parallel import compat
from memshard.parallel.sequence import gather, reduce_scatter
from tests.distributed import run_distributed


class _DataParallelOf211(nn.Module):
    def __init__(self, module: nn.Module, broadcast_buffers: bool = True) -> None:
        super().__init__()


def test_buffers_are_left_alone_by_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.without_buffer_broadcasts() == {"forward_sync_buffers": False}
    monkeypatch.setattr(compat, "DistributedDataParallel", _DataParallelOf211)
    assert compat.without_buffer_broadcasts() == {"broadcast_buffers": False}


def _sequences(rank: int, ranks: int, old: bool) -> tuple[Tensor, Tensor]:
    group: Any = dist.group.WORLD
    with pytest.MonkeyPatch.context() as names:
        if old:
            for name in ("all_gather_single", "reduce_scatter_single"):
                names.delattr(dist, name)
        x = torch.arange(6.0).view(1, 3, 2) + 10 * rank
        return gather(x, group), reduce_scatter(torch.cat([x, x + 1], dim=1), group)


def test_sequences_are_joined_and_dealt_out_by_the_old_names() -> None:
    new, old = (run_distributed(_sequences, 2, old) for old in (False, True))
    for ours, theirs in zip(old, new, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert new[1][0].flatten().tolist() == [*range(6), *range(10, 16)]


def test_the_last_collectives_of_a_gpu_are_those_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which records them apart; what hosts told one another over gloo would explain nothing."""
    from torch._C import _distributed_c10d

    gloo, nccl = (json.dumps({"entries": [{"pg_id": number}]}).encode() for number in (0, 1))
    monkeypatch.setattr(_distributed_c10d, "_dump_fr_trace_json", lambda: gloo)
    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace_json", lambda: nccl, raising=False)
    assert compat.last_collectives() == nccl
    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace_json", lambda: b'{"entries": []}')
    assert compat.last_collectives() == gloo  # a run on CPUs with a build for GPUs
