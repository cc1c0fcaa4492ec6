"""What RowAdam does with values and states that come from elsewhere."""

from typing import Any

import pytest
import torch
from torch import nn

from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.trainer.optim.rows.adam import RowAdam

_SIZES: dict[str, Any] = {"keys": 4, "heads": 1, "topk": 2, "key_dim": 4}


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("lr", float("nan")), ("betas", (0.9, 1.5)), ("eps", -1e-8), ("clip", -1.0)],
)
def test_numbers_out_of_range_are_refused(option: str, value: object) -> None:
    tables = externalize_tables(ProductKeyMemory(8, **_SIZES))
    with pytest.raises(ValueError, match=f"{option}.* must be at least 0 and below"):
        RowAdam(tables, **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value"), [("lr", "1e-3"), ("clip", None), ("betas", 0.9), ("betas", (0.9,))]
)
def test_what_is_no_number_is_named(option: str, value: Any) -> None:
    tables = externalize_tables(ProductKeyMemory(8, **_SIZES))
    with pytest.raises(ValueError, match=f"{option} is .*; it must be (a number|two numbers)"):
        RowAdam(tables, **{option: value})


def test_no_tables_are_named() -> None:
    with pytest.raises(ValueError, match="there are no tables: externalize_tables"):
        RowAdam(externalize_tables(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="pass it what externalize_tables"):
        RowAdam(ProductKeyMemory(8, **_SIZES))  # type: ignore[arg-type]


def test_a_group_that_would_never_be_stepped_is_refused() -> None:
    tables = externalize_tables(ProductKeyMemory(8, **_SIZES))
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a RowAdam takes no more groups"):
        RowAdam(tables).add_param_group({"params": [other.weight]})


def test_gradients_that_are_cleared_by_hand_are_gone() -> None:
    """In a loop over param_groups, as over parameters."""
    memory = ProductKeyMemory(8, **_SIZES)
    optimizer = RowAdam(externalize_tables(memory))
    memory(torch.ones(3, 8)).sum().backward()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    before = memory.values.weight.clone()
    optimizer.step()
    assert torch.equal(memory.values.weight, before) and not memory.values.reads


def test_an_optimizer_that_never_steps_is_said() -> None:
    """Once: every pass's reads are kept."""
    memory = ProductKeyMemory(8, **_SIZES)
    optimizer = RowAdam(externalize_tables(memory))

    def passes(count: int) -> None:
        for _ in range(count):
            memory(torch.ones(1, 8)).sum().backward()

    passes(999)
    with pytest.warns(UserWarning, match="1,000 reads since its RowAdam last stepped"):
        passes(1)
    passes(1)
    optimizer.step()
    assert not memory.values.reads


def test_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="externalize_tables"):
        RowAdam(ProductKeyMemory(8, **_SIZES).parameters())  # type: ignore[arg-type]


def _step(memory: ProductKeyMemory, optimizer: RowAdam) -> None:
    memory(torch.ones(3, 8, dtype=memory.query.weight.dtype)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("way", ["load", "in place", "data"])
def test_values_that_are_loaded_after_the_optimizer_was_made_stay(way: str) -> None:
    """The fp32 copy of a table in half precision takes them over, also between steps."""
    memory = ProductKeyMemory(8, **_SIZES, query_norm="none", dtype=torch.bfloat16)
    optimizer = RowAdam(externalize_tables(memory), lr=1e-4)
    for _ in range(2):
        new = torch.full_like(memory.values.weight, 3.0)
        if way == "load":
            memory.load_state_dict(memory.state_dict() | {"values.weight": new})
        else:
            values = memory.values.weight
            (values if way == "in place" else values.data).copy_(new)
        _step(memory, optimizer)
        copy = optimizer.state[memory.values.anchor]["master"]
        torch.testing.assert_close(copy, new.float(), rtol=0, atol=2e-4)
        assert (copy != 3).any(), "rows that were read have moved"
        torch.testing.assert_close(memory.values.weight, new, rtol=0, atol=0)
    # Digits that the values have no place for are kept.
    before = copy.clone()
    memory.load_state_dict({name: x.clone() for name, x in memory.state_dict().items()})
    optimizer.step()
    torch.testing.assert_close(copy, before, rtol=0, atol=0)


def test_a_state_of_another_table_is_refused() -> None:
    """Kernels would write beyond it."""
    small = ProductKeyMemory(8, **_SIZES)
    state = RowAdam(externalize_tables(small)).state_dict()
    memory = ProductKeyMemory(8, **_SIZES | {"keys": 8})
    optimizer = RowAdam(externalize_tables(memory))
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"\(64, 8\) and its optimizer state exp_avg \(16, 8\)"):
        _step(memory, optimizer)


def test_a_state_of_other_semantics_is_refused() -> None:
    memory = ProductKeyMemory(8, **_SIZES)
    tables = externalize_tables(memory)
    state = RowAdam(tables).state_dict()
    optimizer = RowAdam(tables, semantics="row-step")
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="row-step"):
        _step(memory, optimizer)


def test_an_optimizer_that_was_made_on_the_meta_device_is_refused() -> None:
    memory = ProductKeyMemory(8, **_SIZES, device="meta")
    optimizer = RowAdam(externalize_tables(memory))
    memory.load_state_dict(ProductKeyMemory(8, **_SIZES).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="load the values"):
        _step(memory, optimizer)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_shared_table_that_was_frozen_with_a_layer_stays_frozen(frozen: int) -> None:
    """Whichever of its layers it was, as a parameter would."""
    first = ProductKeyMemory(8, **_SIZES, query_norm="none")
    layers = nn.ModuleList(
        [first, ProductKeyMemory(8, **_SIZES, query_norm="none", values=first.values)]
    )
    layers[frozen].requires_grad_(False)
    (table,) = externalize_tables(layers)
    before = table.weight.clone()
    optimizer = RowAdam([table])
    sum(layer(torch.ones(3, 8)) for layer in layers).sum().backward()  # type: ignore[union-attr]
    optimizer.step()
    torch.testing.assert_close(table.weight, before, rtol=0, atol=0)


def test_values_that_are_tied_to_another_weight_are_refused() -> None:
    """Each of the two would learn from its own gradient, with moments of its own."""
    layers = nn.ModuleList([ProductKeyMemory(8, **_SIZES), ProductKeyMemory(8, **_SIZES)])
    first, second = (memory.values for memory in layers)  # type: ignore[union-attr]
    linear = nn.Linear(8, 16, bias=False)
    linear.weight = first.weight
    with pytest.raises(ValueError, match="also the weight of a Linear"):
        externalize_tables(nn.ModuleList([layers, linear]))
    second.weight = first.weight
    with pytest.raises(ValueError, match="also the weight of a ValueTable"):
        externalize_tables(layers)
    second.weight = nn.Parameter(second.weight.detach().clone())
    tables = externalize_tables(layers)
    second.weight = first.weight
    with pytest.raises(ValueError, match="two tables have the same values in memory"):
        RowAdam(tables)


def test_a_compiled_step_updates_as_a_plain_one() -> None:
    """torch.compile(optimizer.step), or of a whole training step."""
    values = []
    for compiled in (False, True):
        torch.manual_seed(0)
        table = ValueTable(6, 4)
        table.hide()
        optimizer = RowAdam([table], lr=0.1, semantics="row-step")
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for reads in (2, 3, 4):
            rows = torch.arange(reads)[None]
            table.weighted_sum(rows, torch.ones(1, reads)).square().sum().backward()
            step()
        values.append(table.weight)
    assert torch.equal(*values)
