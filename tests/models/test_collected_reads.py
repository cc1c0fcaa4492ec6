"""What happens to a hidden table's collected gradient between backward and the optimizer's step."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam

from memshard.models.memory.peer import Peer
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.trainer.optim.combined import CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam

_SIZES: dict[str, Any] = {"keys": 4, "heads": 2, "topk": 2, "key_dim": 8, "query_norm": "layer"}


def _shown(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
def test_gradients_that_are_scaled_after_each_micro_batch_count(
    kind: type[ProductKeyMemory],
) -> None:
    """As those of parameters do, for a table that was hidden or not."""
    torch.manual_seed(0)
    visible = nn.Sequential(kind(8, **_SIZES), kind(8, **_SIZES)).double()
    hidden = copy.deepcopy(visible)
    tables = externalize_tables(hidden)
    optimizers = (
        Adam(visible.parameters(), 1e-2),
        CombinedOptimizer(
            Adam(hidden.parameters(), 1e-2), RowAdam(tables, 1e-2, semantics="dense")
        ),
    )
    for model, optimizer in zip((visible, hidden), optimizers, strict=True):
        torch.manual_seed(1)
        for _ in range(3):
            for tokens in (3, 1, 5):
                model(torch.randn(tokens, 8).double()).square().sum().backward()
                for weight in _shown(optimizer):
                    if weight.grad is not None:
                        weight.grad.mul_(0.3)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(hidden.state_dict(), visible.state_dict(), rtol=0, atol=1e-11)


class _Rows(nn.Module):
    """A layer of a user's, which reads a table by its own rule."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ValueTable(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(x))[:, None] % 6
        return x + self.table(rows, x[:, :1])


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, at_once: bool) -> None:
    """Train with gradients scaled after each backward pass. at_once: all of a step's forward passes
    come before them.
    """
    torch.manual_seed(1)
    for _ in range(3):
        batches = [torch.randn(tokens, 8).double() for tokens in (3, 1, 5)]
        losses = (model(x).square().sum() for x in batches)
        for loss in list(losses) if at_once else losses:
            loss.backward()
            for weight in _shown(optimizer):
                if weight.grad is not None:
                    weight.grad.mul_(0.3)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("case", ["frozen layer", "a user's layer", "passes at once"])
def test_scaled_gradients_count_wherever_the_layer_does_not_show_its_own(case: str) -> None:
    torch.manual_seed(0)
    memory = ProductKeyMemory(8, **_SIZES)
    middle = _Rows() if case == "a user's layer" else memory
    visible = nn.Sequential(nn.Linear(8, 8), middle).double()
    if case == "frozen layer":
        memory.requires_grad_(False)
        memory.values.requires_grad_(True)
    hidden = copy.deepcopy(visible)
    tables = externalize_tables(hidden)
    rows = RowAdam(tables, 1e-2, semantics="dense")
    _train(visible, Adam(visible.parameters(), 1e-2), case == "passes at once")
    combined = CombinedOptimizer(Adam(hidden.parameters(), 1e-2), rows)
    _train(hidden, combined, case == "passes at once")
    torch.testing.assert_close(hidden.state_dict(), visible.state_dict(), rtol=0, atol=1e-11)


def test_a_scaled_gradient_that_nothing_explains_is_refused() -> None:
    """A table learns alone: whether a step was skipped does not show in any parameter."""
    memory = ProductKeyMemory(8, **_SIZES).requires_grad_(False)
    tables = externalize_tables(memory)
    tables[0].requires_grad_(True)
    optimizer = RowAdam(tables)
    memory(torch.randn(4, 8)).sum().backward()
    optimizer.unscale(3.0)
    with pytest.raises(RuntimeError, match="zero_grad"):
        memory(torch.randn(4, 8))
    optimizer.zero_grad()
    (memory(torch.randn(4, 8)) * torch.inf).sum().backward()
    optimizer.unscale(3.0)
    memory(torch.randn(4, 8)).sum().backward()
    assert len(tables[0].reads) == 1, "an overflow explains it"


def test_clipping_after_each_micro_batch_forgets_no_read() -> None:
    memory = ProductKeyMemory(8, **_SIZES)
    optimizer = CombinedOptimizer(
        Adam(memory.parameters()), RowAdam(externalize_tables(memory), semantics="lazy")
    )
    for _ in range(3):
        memory(torch.randn(4, 8)).square().sum().backward()
        clip_grad_norm_(_shown(optimizer), 1e-3)
    assert len(memory.values.reads) == 3


def test_what_a_skipped_step_left_is_still_dropped() -> None:
    """A scaler has unscaled it, and model.zero_grad() has not seen it."""
    memory = ProductKeyMemory(8, **_SIZES)
    optimizer = RowAdam(externalize_tables(memory))
    memory(torch.randn(4, 8)).sum().backward()
    optimizer.unscale(1024.0)
    memory.zero_grad()
    memory(torch.randn(4, 8)).sum().backward()
    assert len(memory.values.reads) == 1


def test_threads_that_train_one_model_lose_no_read() -> None:
    memory = ProductKeyMemory(8, **_SIZES)
    RowAdam(externalize_tables(memory))

    def passes() -> None:
        for _ in range(50):
            memory(torch.randn(500, 8)).sum().backward()

    threads = [threading.Thread(target=passes) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(memory.values.reads) == 200


def test_a_model_that_is_cast_between_passes_is_refused_at_the_step() -> None:
    """The gradient is cast with it, as a parameter's is."""
    memory = ProductKeyMemory(8, **_SIZES)
    optimizer = RowAdam(externalize_tables(memory))
    memory(torch.randn(4, 8)).sum().backward()
    memory.double()
    memory(torch.randn(4, 8).double()).sum().backward()
    assert len(memory.values.reads) == 2
    with pytest.raises(
        RuntimeError, match="float64 since RowAdam was made for it: cast the model first"
    ):
        optimizer.step()


def test_values_that_are_given_with_a_gradient_are_refused() -> None:
    """A hidden table's gradient goes to its RowAdam: what is given in its place would get none."""
    memory = ProductKeyMemory(8, **_SIZES)
    externalize_tables(memory)
    x = torch.randn(4, 8)
    given = {name: value.clone() for name, value in memory.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(memory, given, (x,)), memory(x))
    given = {name: value.requires_grad_() for name, value in given.items()}
    with pytest.raises(NotImplementedError, match=r"leave them out of what torch\.func"):
        torch.func.functional_call(memory, given, (x,))
    del given["values.weight"]
    torch.func.functional_call(memory, given, (x,)).sum().backward()
    assert given["query.weight"].grad is not None


def test_parameters_are_stepped_within_backward_and_tables_after_it() -> None:
    torch.manual_seed(0)
    visible = nn.Sequential(ProductKeyMemory(8, **_SIZES), ProductKeyMemory(8, **_SIZES)).double()
    hidden = copy.deepcopy(visible)
    rows = RowAdam(externalize_tables(hidden), 1e-2, semantics="dense")

    def step(weight: torch.Tensor) -> None:
        dense[weight].step()
        dense[weight].zero_grad()

    dense = {weight: Adam([weight], 1e-2) for weight in hidden.parameters()}
    for weight in dense:
        weight.register_post_accumulate_grad_hook(step)
    optimizer = Adam(visible.parameters(), 1e-2)
    for _ in range(3):
        x = torch.randn(5, 8).double()
        hidden(x).square().mean().backward()
        rows.step()
        visible(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(hidden.state_dict(), visible.state_dict(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_a_hidden_table_would_not_call_are_refused(kind: str) -> None:
    memory = ProductKeyMemory(8, **_SIZES)
    handle = getattr(memory.values.weight, kind)(lambda _: None)
    with pytest.raises(ValueError, match="would not be called once it is hidden"):
        externalize_tables(memory)
    handle.remove()
    optimizer = RowAdam(externalize_tables(memory))
    (anchor,) = _shown(optimizer)
    handle = getattr(anchor, kind)(lambda _: None)
    with pytest.raises(NotImplementedError, match=r"step RowAdam after backward\(\)"):
        memory(torch.randn(4, 8)).sum().backward()
    handle.remove()
    memory(torch.randn(4, 8)).sum().backward()


def test_two_optimizers_of_the_same_reads_are_refused() -> None:
    memory = ProductKeyMemory(8, **_SIZES)
    tables = externalize_tables(memory)
    first, second = RowAdam(tables), RowAdam(tables)
    memory(torch.randn(4, 8)).sum().backward()
    first.step()
    with pytest.raises(RuntimeError, match="make one RowAdam for each table"):
        second.step()


def test_optimizers_of_a_table_take_turns() -> None:
    """Each has a backward pass of its own, or replaces the one before."""
    memory = ProductKeyMemory(8, **_SIZES)
    tables = externalize_tables(memory)
    optimizers = [RowAdam(tables), RowAdam(tables)]
    for optimizer in optimizers * 2:
        memory(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    optimizers[1].zero_grad()
    optimizers[0].step()  # nothing was read
    memory(torch.randn(4, 8)).sum().backward()
    optimizers[1].step()
    RowAdam(tables).step()
    assert [optimizer.state[tables[0].anchor]["step"] for optimizer in optimizers] == [2, 3]
