from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

from memshard.models.memory.kinds import QueryNormKind
from memshard.models.memory.peer import Peer
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import ValueTable, count_parameters, externalize_tables
from memshard.trainer.optim.combined import CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam

SMALL = {"keys": 8, "heads": 2, "topk": 4, "key_dim": 8}


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


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("query_norm", ["batch", "layer", "layer-half", "rms", "lagged", "none"])
@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
def test_layers_train_in_pure_half_precision(
    kind: type[ProductKeyMemory], query_norm: str, dtype: torch.dtype, hidden: bool
) -> None:
    torch.manual_seed(0)
    memory = kind(8, **SMALL, query_norm=query_norm).to(dtype)
    tables = externalize_tables(memory) if hidden else []
    # The default eps, 1e-8, is 0 in fp16.
    dense = torch.optim.AdamW(memory.parameters(), lr=0.01, eps=1e-4)
    optimizer = CombinedOptimizer(dense, RowAdam(tables, lr=0.01)) if hidden else dense
    x, y = torch.randn(2, 64, 8, dtype=dtype)
    x.requires_grad_()
    losses = []
    for _ in range(25):
        output = memory(x)
        assert output.dtype == dtype
        loss = (output.float() - y.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in (x, *memory.parameters())
        )
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert memory.eval()(x).isfinite().all()


def test_constructors_take_a_dtype_and_a_device() -> None:
    memories = [
        ProductKeyMemory(8, **SMALL, gate=True, value_dim=4, dtype=torch.bfloat16, device="meta"),
        Peer(8, **SMALL, dtype=torch.bfloat16, device="meta"),
        ValueTable(4, 8, dtype=torch.bfloat16, device="meta"),
    ]
    for module in memories:
        assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}
    # Built without memory, then filled as the same layer is that was built with it.
    memory = memories[1].to_empty(device="cpu")
    torch.manual_seed(0)
    for module in memory.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.manual_seed(0)
    built = Peer(8, **SMALL, dtype=torch.bfloat16).state_dict()
    for name, tensor in memory.state_dict().items():
        assert torch.equal(tensor, built[name]), name


def test_an_input_of_another_dtype_is_explained() -> None:
    memory = ProductKeyMemory(8, **SMALL, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"float32 and its weights are torch.bfloat16.*memory.to"):
        memory(torch.randn(4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert memory(torch.randn(4, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 9}, "set topk to at most 8"),
        ({"key_dim": 5}, "key_dim is 5.*even"),
        ({"value_dim": 4}, "turn on gate"),
        ({"query_norm": "bath"}, "query_norm.*bath.*batch"),
        ({"topk": 0}, "topk is 0"),
        (
            {"score_precision": "bf16"},
            "score_precision is .bf16.; expected one of fp32, tf32, bf16x3",
        ),
    ],
)
def test_wrong_sizes_are_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProductKeyMemory(**({"dim": 8, "keys": 8, "heads": 2, "topk": 4, "key_dim": 8} | changes))


def test_a_shared_table_must_fit() -> None:
    values = ProductKeyMemory(8, keys=8, topk=4).values
    with pytest.raises(ValueError, match="64 x 8.*81 x 8"):
        ProductKeyMemory(8, keys=9, topk=4, values=values)


def test_the_layer_says_what_it_is() -> None:
    layer = Peer(6, keys=5, heads=2, topk=3, key_dim=4)
    externalize_tables(layer)
    for line in (
        "Peer(\n  6, heads=2, topk=3, weighting=softmax",
        "(values): ValueTable(25, 6, hidden)",
        "(sub_keys): SubKeys(heads=2, keys=2 x 5, half=2)",
        "(query_norm): QueryNorm(batch)",
    ):
        assert line in repr(layer)
    assert get_type_hints(Peer.__init__)["query_norm"] == QueryNormKind


def test_hidden_tables_count_as_parameters() -> None:
    first = ProductKeyMemory(6, keys=5, heads=2, topk=3, key_dim=4)
    model = nn.ModuleList(
        [first, ProductKeyMemory(6, keys=5, heads=2, topk=3, key_dim=4, values=first.values)]
    )
    whole = sum(weight.numel() for weight in model.parameters())
    assert count_parameters(model) == whole
    externalize_tables(model)
    assert count_parameters(model) == whole
    assert sum(weight.numel() for weight in model.parameters()) == whole - 150


def test_wrong_inputs_are_named() -> None:
    layer = ProductKeyMemory(6, keys=5, heads=2, topk=3, key_dim=4)
    with pytest.raises(ValueError, match="5 wide, this ProductKeyMemory was made for 6"):
        layer(torch.randn(3, 5))
    with pytest.raises(NotImplementedError, match="does not run under torch.func"):
        torch.func.vmap(layer)(torch.randn(3, 2, 6))
    for x in (torch.tensor(1.0), torch.ones(3, 6, dtype=torch.int64), [1.0] * 6):
        with pytest.raises(
            TypeError, match=r"the input of ProductKeyMemory is a tensor \[..., 6\]"
        ):
            layer(x)


@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
def test_a_mask_that_is_no_mask_of_tokens_is_refused(kind: type[ProductKeyMemory]) -> None:
    """One of whole numbers, as tokenizers return, would number tokens: outputs of others."""
    layer = kind(6, keys=5, heads=2, topk=3, key_dim=4)
    x = torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    for wrong in (mask, mask.float(), mask.tolist()):
        with pytest.raises(TypeError, match=r"pass attention_mask.bool\(\)"):
            layer(x, padding=wrong)
    for shape in (mask[:, :3], mask[0], mask[..., None].expand(2, 4, 6)):
        with pytest.raises(ValueError, match="padding has one number for each token"):
            layer(x, padding=shape.bool())
    assert not layer(x, padding=mask.bool())[mask == 0].any()


@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer, ValueTable])
def test_sizes_and_kinds_without_sense_are_named(kind: type[nn.Module]) -> None:
    sizes: dict[str, Any] = {"dim": 6, "keys": 5, "heads": 2, "topk": 3, "key_dim": 4}
    if kind is ValueTable:
        sizes = {"dim": 6, "slots": 9}
    for name in sizes:
        for size in (0, -1):
            with pytest.raises(ValueError, match=f"{name} is {size}; it must be at least 1"):
                kind(**sizes | {name: size})
        for odd in (4.0, "4", None, True):
            with pytest.raises(ValueError, match=f"{name} is {odd!r}; it must be a whole number"):
                kind(**sizes | {name: odd})
    for dtype in ("bf16", torch.int8, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="dtype is .*; it is torch.float32"):
            kind(**sizes, dtype=dtype)
    if kind is not ValueTable:
        with pytest.raises(TypeError, match="values is Linear; it must be a ValueTable"):
            kind(**sizes, values=nn.Linear(3, 3))


@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_output_is_no_view(kind: type[ProductKeyMemory], hidden: bool) -> None:
    """FSDP2 warns of modules that return one."""
    layer = kind(6, keys=5, heads=2, topk=3, key_dim=4)
    externalize_tables(layer) if hidden else None
    for shape in ((3, 6), (2, 3, 6)):
        assert not layer(torch.randn(shape))._is_view()


@pytest.mark.parametrize("value_dim", [0, -3, 8.0])
def test_a_width_of_values_without_sense_is_named(value_dim: Any) -> None:
    """0 is not the default."""
    with pytest.raises(ValueError, match=f"value_dim is {value_dim}; it must be"):
        ProductKeyMemory(6, keys=5, topk=3, value_dim=value_dim, gate=True)


@pytest.mark.parametrize("hidden", [False, True])
def test_reads_of_other_shapes_or_types_are_refused(hidden: bool) -> None:
    table = ValueTable(9, 4)
    table.hide() if hidden else None
    rows = torch.tensor([[0, 1]])
    for wrong, weights in (
        (rows.float(), torch.ones(1, 2)),
        (rows > 0, torch.ones(1, 2)),
        (rows, torch.ones(1, 3)),
        (rows[0], torch.ones(2)),
    ):
        with pytest.raises(ValueError, match=r"rows are integers \[tokens, reads\]"):
            table.weighted_sum(wrong, weights)
    with pytest.raises(ValueError, match=r"rows are integers \[tokens, reads\]"):
        table.dot(rows, torch.ones(1, 3))


@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
@pytest.mark.parametrize("hidden", [False, True])
def test_second_derivatives_are_refused(kind: type[ProductKeyMemory], hidden: bool) -> None:
    """Where they pass through the layer; a graph may be made."""
    layer = kind(6, keys=5, heads=2, topk=3, key_dim=4)
    externalize_tables(layer) if hidden else None
    x = torch.randn(3, 6, requires_grad=True)
    # The second has a gradient upstream that depends on nothing.
    for loss in (layer(x).square().sum(), layer(x).sum()):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(NotImplementedError, match="have no second derivative"):
            torch.autograd.grad(gradient.sum(), x, retain_graph=True)
        with pytest.raises(NotImplementedError, match="have no second derivative"):
            gradient.sum().backward()
