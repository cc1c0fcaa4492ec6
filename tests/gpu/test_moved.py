"""Optimizers made before their model moves, as transformers' Trainer and Lightning do."""

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import externalize_tables
from memshard.trainer.optim.combined import CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam
from tests.gpu.fake_cuda import fake_cuda, on_fake_cuda


def _trained(device: str, dtype: torch.dtype, steps_before: int) -> tuple[Tensor, dict[str, str]]:
    """Return a table after some steps on the CPU and two on a device, and where its state is."""
    torch.manual_seed(0)
    memory = ProductKeyMemory(16, keys=8, heads=2, topk=3, key_dim=8, query_norm="layer")
    (table,) = externalize_tables(memory)
    table.to(dtype)
    rows = RowAdam([table], 1e-2, semantics="row-step")
    # torch's own optimizers have no state before their first step, and it does not follow a model.
    dense = AdamW(memory.query.parameters(), 1e-2)
    optimizer = rows if steps_before else CombinedOptimizer(dense, rows)
    x = torch.randn(5, 16)

    def step(x: Tensor) -> None:
        memory(x).square().sum().backward()
        optimizer.step()
        memory.zero_grad()
        optimizer.zero_grad()

    with fake_cuda():
        for _ in range(steps_before):
            step(x)
        memory.to(device)
        for _ in range(2):
            step(x.to(device))
        state = rows.state[table.anchor]
        places = {name: value.device.type for name, value in state.items() if name != "step"}
        return table.weight.float().cpu(), places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_state_of_a_table_follows_it(dtype: torch.dtype, steps_before: int) -> None:
    moved, places = on_fake_cuda(_trained, "cuda", dtype, steps_before)
    twin, _ = on_fake_cuda(_trained, "cpu", dtype, steps_before)
    assert set(places.values()) == {"cuda"}
    torch.testing.assert_close(moved, twin)
