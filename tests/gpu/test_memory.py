"""A memory layer on a GPU: nothing waits for the device, and few kernels are launched."""

import pytest
import torch

from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.trainer.optim.rows.adam import RowAdam
from tests.gpu.fake_cuda import Counts, fake_cuda, on_fake_cuda


def _pass(capability: tuple[int, int], dtype: torch.dtype) -> Counts:
    """Return what a pass forward and back, and a step, of 16k tokens by 128 of 1M x 1024 values
    ask of the device.
    """
    with fake_cuda(capability, computed=4096) as watch:
        memory = ProductKeyMemory(1024, 1024, 4, 32, 512, device="meta")
        memory.values.to(dtype)
        memory.to_empty(device="cuda")
        optimizer = RowAdam(externalize_tables(memory))
        for _ in range(2):
            x = torch.empty(16384, 1024, device="cuda", requires_grad=True)
            upstream = torch.empty_like(x)
            with watch.counted() as counts:
                with torch.autocast("cuda", torch.bfloat16 if capability >= (8, 0) else torch.half):
                    y = memory(x)
                y.backward(upstream)
                optimizer.step()
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_large_memory_takes_80_launches_and_no_wait(dtype: torch.dtype) -> None:
    counts = on_fake_cuda(_pass, (9, 0), dtype)
    assert counts.launches.total() <= 80, counts.launches
    assert not counts.waits and not counts.blocking, counts
    # Queries and sums in fp32; no scores.
    assert counts.largest == 16384 * 2048 * 4


def _update(rows: int) -> Counts:
    """Return what plain torch asks of the device to update rows of which 1,024 make a block."""
    with fake_cuda((6, 0)) as watch:
        table = ValueTable(20_000, 1 << 14, device="meta")
        table.hide()
        table.to_empty(device="cuda")
        optimizer = RowAdam([table])
        reads = torch.arange(rows, device="cuda")[None]
        weights = torch.ones(1, rows, device="cuda", requires_grad=True)
        table.weighted_sum(reads, weights).sum().backward()
        with watch.counted() as counts:
            optimizer.step()
        assert optimizer.touched == [(rows, rows)]
    return counts


def test_a_large_memory_takes_400_launches_and_one_wait_in_plain_torch() -> None:
    """Whatever is read: rows are updated in at most 12 blocks, whose number is asked for once."""
    counts = on_fake_cuda(_pass, (6, 0), torch.float32)
    assert counts.waits.total() == 1 and not counts.blocking, counts
    updates = {rows: on_fake_cuda(_update, rows) for rows in (1024, 2048, 12288, 15000)}
    launches = {rows: update.launches.total() for rows, update in updates.items()}
    assert launches[12288] - launches[1024] == 11 * (launches[2048] - launches[1024])
    assert launches[15000] == launches[12288]
    assert counts.launches.total() + launches[12288] - launches[1024] <= 400, counts.launches
    assert all(update.waits.total() == 1 for update in updates.values())


def _gradients(dtype: torch.dtype, capability: tuple[int, int]) -> tuple[torch.dtype, list[float]]:
    """Return how the gradient of sums is kept under autocast, and that of the weights."""
    with fake_cuda(capability):
        table = ValueTable(3, 2)
        with torch.no_grad():
            table.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        table.hide()
        table.cuda()
        table.has_optimizer = True
        weights = torch.ones(1, 3).cuda().requires_grad_()
        with torch.autocast("cuda", dtype):
            sums = table.weighted_sum(torch.tensor([[0, 1, 2]]).cuda(), weights)
        # 2^-12 is beyond what bf16 has of 1 and 2.
        sums.backward(torch.tensor([[1.0, 2.0]]).cuda() * (1 + 2**-12))
        assert weights.grad is not None
        return table.reads[0].upstream.dtype, weights.grad.flatten().tolist()


def test_gradients_of_sums_are_kept_in_bf16_under_autocast_where_kernels_take_them() -> None:
    exact = [1 + 2**-12, 2 + 2**-11, 3 + 3 * 2**-12]
    kept = on_fake_cuda(_gradients, torch.bfloat16, (9, 0))
    assert kept == (torch.bfloat16, [1.0, 2.0, 3.0])
    for dtype, capability in ((torch.float16, (9, 0)), (torch.bfloat16, (6, 0))):
        assert on_fake_cuda(_gradients, dtype, capability) == (torch.float32, exact)
