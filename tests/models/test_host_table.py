"""A table in host memory trains as one on the model's device; here both lie in host memory, on a
GPU only the model does not.
"""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from memshard.models.memory.peer import Peer
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import externalize_tables
from memshard.trainer.optim.combined import CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


def _train(
    model: nn.Module, tokens: int, host: bool, device: str
) -> tuple[list[Tensor], list[int]]:
    """Return outputs, gradients to the input and values after three steps, and how many reads each
    table's first gradient kept.
    """
    tables = externalize_tables(model)
    for table in tables:
        table.host = host
    model.to(device)
    assert all(table.weight.device.type == ("cpu" if host else device) for table in tables)
    optimizer = CombinedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), RowAdam(tables, 0.05, rounding="stochastic")
    )
    results = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(tokens, 12, generator=generator).to(device).requires_grad_()
        y = model(x)
        y.square().mean().backward()
        assert x.grad is not None and y.device.type == device
        results += [y.detach(), x.grad]
        kept = [len(table.reads[0].rows) for table in tables]
        optimizer.step()
        optimizer.zero_grad()
    return [*results, *(table.weight.float() for table in tables)], kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "fetched"), [(2, False), (40, True)])
@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_steps_are_those_of_a_table_beside_the_model(
    kind: type, tokens: int, fetched: bool, dtype: torch.dtype, device: str
) -> None:
    """Few reads travel as sums, many reads of the same rows as distinct rows."""
    torch.manual_seed(0)
    model = kind(12, keys=4, heads=2, topk=3, key_dim=8, query_norm="layer")
    for name in ("values", "down"):
        if hasattr(model, name):
            getattr(model, name).to(dtype)
    (ours, kept), (theirs, reads) = (
        _train(deepcopy(model), tokens, host, device) for host in (True, False)
    )
    assert all(count == 6 * tokens for count in reads)
    assert all(count <= 16 if fetched else count == 6 * tokens for count in kept)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=tolerance, atol=tolerance)


def test_a_host_table_follows_the_models_dtype_and_not_its_device() -> None:
    model = ProductKeyMemory(12, keys=4, heads=1, topk=2, key_dim=8)
    (table,) = externalize_tables(model)
    table.host = True
    before = table.weight.clone()
    model.to("meta")
    assert model.query.weight.is_meta and torch.equal(table.weight, before)
    model.to(torch.bfloat16)
    assert torch.equal(table.weight, before.to(torch.bfloat16))
    with torch.device("meta"):
        empty = ProductKeyMemory(12, keys=4, heads=1, topk=2, key_dim=8)
    (table,) = externalize_tables(empty)
    table.host = True
    empty.to_empty(device="cpu")
    assert (
        table.weight.device.type == "cpu"
        and table.weight.shape == (16, 12)
        and table.anchor.device.type == "cpu"
    )
