from typing import Any

import pytest
import torch

from memshard.models.memory.product_key import ProductKeyMemory


@pytest.mark.parametrize("query_norm", ["batch", "layer", "layer-half", "rms", "lagged", "none"])
def test_a_standalone_layer_learns_with_plain_adamw(query_norm: str) -> None:
    torch.manual_seed(0)
    memory = ProductKeyMemory(8, keys=8, heads=2, topk=4, key_dim=8, query_norm=query_norm)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.1)
    x, y = torch.randn(2, 64, 8)
    losses = []
    for _ in range(25):
        loss = (memory(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_precision_stay_close_to_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    memory = ProductKeyMemory(8, keys=8, heads=2, topk=8, key_dim=8, query_norm="layer", gate=True)
    x = torch.randn(32, 8)
    exact = memory(x)
    with torch.autocast("cpu", dtype=dtype):
        autocast = memory(x)
    half = memory.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    assert half.isfinite().all()
    half.float().sum().backward()
    # Rounding may exchange the last of the slots read: nearly all outputs agree, not every one.
    for y in (autocast, half):
        assert ((y - exact).abs() < 0.05 * exact.abs().max()).float().mean() > 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 9}, "set topk to at most 8"),
        ({"key_dim": 5}, "key_dim is 5.*even"),
        ({"value_dim": 4}, "turn on gate"),
        ({"query_norm": "bath"}, "query_norm.*bath.*batch"),
        ({"topk": 0}, "topk is 0"),
    ],
)
def test_wrong_sizes_are_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProductKeyMemory(**({"dim": 8, "keys": 8, "heads": 2, "topk": 4, "key_dim": 8} | changes))


def test_a_shared_table_must_fit() -> None:
    values = ProductKeyMemory(8, keys=8, topk=4).values
    with pytest.raises(ValueError, match="64 x 8.*81 x 8"):
        ProductKeyMemory(8, keys=9, topk=4, values=values)
