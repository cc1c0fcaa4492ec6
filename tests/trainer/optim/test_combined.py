"""CombinedOptimizer is an ordinary optimizer to GradScaler, schedulers,
clipping and checkpoints.
"""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.trainer.optim.combined import CombinedOptimizer
from memshard.trainer.optim.rows.adam import RowAdam


class _Run:
    """A small regression with one memory layer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        memory = ProductKeyMemory(6, keys=6, heads=2, topk=3, key_dim=4, query_norm="layer")
        self.first = nn.Linear(6, 6)
        self.model = nn.Sequential(self.first, memory, nn.Linear(6, 1)).to(dtype)
        (self.table,) = externalize_tables(self.model)
        groups: list[dict[str, Any]] = [
            {"params": self.first.parameters(), "lr": 0.02},
            {"params": self.model[1:].parameters()},
        ]
        dense = AdamW(groups, lr=0.01)
        self.optimizer = CombinedOptimizer(dense, RowAdam([self.table], lr=0.05))
        self.dtype = dtype

    def loss(self, step: int) -> Tensor:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(self.dtype)
        return (self.model(x) - x.sum(1, keepdim=True)).square().mean()

    def step(self, step: int) -> float:
        loss = self.loss(step)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def everything(self) -> dict[str, Tensor]:
        """Return weights, moments and step counts."""
        state = self.optimizer.state_dict()["state"]
        tensors = {
            f"{i}.{name}": torch.as_tensor(value).clone()
            for i, part in state.items()
            for name, value in part.items()
        }
        return tensors | {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def _assert_equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_it_trains() -> None:
    run = _Run()
    losses = [run.step(0) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("unscale_first", [False, True])
def test_loss_scaling_does_not_change_the_updates(unscale_first: bool) -> None:
    plain, scaled = _Run(), _Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(5):
        plain.step(step)
        scaled.optimizer.zero_grad()
        # Two micro-batches that add up to one.
        for _ in range(2):
            scaler.scale(scaled.loss(step) / 2).backward()
        if unscale_first:
            scaler.unscale_(scaled.optimizer)
        scaler.step(scaled.optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**12
    for name, tensor in plain.everything().items():
        torch.testing.assert_close(
            scaled.everything()[name], tensor, rtol=1e-4, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("where", ["dense", "table", "reading weights"])
def test_an_overflow_anywhere_leaves_everything_untouched(where: str, unscale_first: bool) -> None:
    run = _Run()
    run.step(0)
    before = run.everything()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run.optimizer.zero_grad()
    scaler.scale(run.loss(1)).backward()
    if where == "dense":
        assert run.first.weight.grad is not None
        run.first.weight.grad[0, 0] = torch.inf
    else:
        # A read whose weights are constants: only the table hears of the overflow.
        weights, upstream = torch.ones(1, 2), torch.ones(1, 6)
        (upstream if where == "table" else weights)[0, 0] = torch.inf
        run.table.weighted_sum(torch.tensor([[1, 2]]), weights).backward(upstream)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in run.model.parameters())
    if unscale_first:
        scaler.unscale_(run.optimizer)
    scaler.step(run.optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    _assert_equal_bits(run.everything(), before)

    # The next step is as if nothing had happened.
    twin = _Run()
    for step in (0, 2):
        twin.step(step)
    run.step(2)
    _assert_equal_bits(run.everything(), twin.everything())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("where", ["dense", "table"])
def test_a_trainer_that_clears_only_the_models_gradients_gets_over_an_overflow(
    where: str, clip: bool
) -> None:
    """Hugging Face's Trainer calls model.zero_grad(), which does not see the tables: the skipped
    step's reads must not stay.
    """
    run, twin = _Run(), _Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        # Two micro-batches that add up to one.
        for _ in range(2):
            scaler.scale(run.loss(step) / 2).backward()
        if step == 1 and where == "dense":
            assert run.first.weight.grad is not None
            run.first.weight.grad[0, 0] = torch.inf
        if step == 1 and where == "table":
            run.table.weighted_sum(torch.tensor([[1]]), torch.ones(1, 1)).backward(
                torch.full((1, 6), torch.nan)
            )
        if clip:
            scaler.unscale_(run.optimizer)
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e6)
        scaler.step(run.optimizer)
        scaler.update()
        run.model.zero_grad()
        if step != 1:
            for _ in range(2):
                (twin.loss(step) / 2).backward()
            twin.optimizer.step()
            twin.optimizer.zero_grad()
    _assert_equal_bits(run.everything(), twin.everything())


def test_gradients_cleared_one_by_one_take_the_reads_with_them() -> None:
    run, twin = _Run(), _Run()
    run.loss(0).backward()
    for parameter in (p for group in run.optimizer.param_groups for p in group["params"]):
        parameter.grad = None
    run.loss(1).backward()
    run.optimizer.step()
    twin.step(1)
    _assert_equal_bits(run.everything(), twin.everything())


def test_clipping_all_parameters_of_the_optimizer_is_clipping_the_dense_ones() -> None:
    """Lightning clips what `param_groups` shows; the tables' stand-ins there must not count."""
    run, unclipped = _Run(), _Run()
    for regression in (run, unclipped):
        (regression.loss(0) * 1000).backward()
    dense = torch.nn.utils.get_total_norm(
        [p.grad for p in run.model.parameters() if p.grad is not None]
    )
    shown = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert torch.equal(torch.nn.utils.clip_grad_norm_(shown, 1.0), dense)
    torch.nn.utils.clip_grad_value_(shown, 1e-3)
    momenta = []
    for regression in (run, unclipped):
        regression.optimizer.step()
        momenta.append(regression.optimizer.state[regression.table.anchor]["exp_avg"])
    # Rows are scaled with the dense gradients, but not limited one by one.
    torch.testing.assert_close(momenta[0], momenta[1] / dense)


def test_schedulers_see_every_group() -> None:
    run = _Run()
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.5**step)
    for step in range(3):
        run.step(step)
        scheduler.step()
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.02 / 8, 0.01 / 8, 0.05 / 8]

    manual = _Run()
    for step in range(3):
        for group, lr in zip(manual.optimizer.param_groups, (0.02, 0.01, 0.05), strict=True):
            group["lr"] = lr * 0.5**step
        manual.step(step)
    _assert_equal_bits(run.model.state_dict(), manual.model.state_dict())


def test_a_scheduler_of_momentum_finds_it_in_every_group() -> None:
    run = _Run()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        run.optimizer, [0.02, 0.01, 0.05], total_steps=4, pct_start=0.5
    )
    run.step(0)
    scheduler.step()
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.02, 0.01, 0.05]
    assert [group["betas"] for group in run.optimizer.param_groups] == [(0.85, 0.999)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_continues_from_its_states_bit_by_bit(dtype: torch.dtype) -> None:
    run = _Run(dtype)
    for step in range(3):
        run.step(step)
    buffer = io.BytesIO()
    torch.save((run.model.state_dict(), run.optimizer.state_dict()), buffer)
    buffer.seek(0)
    model, optimizer = torch.load(buffer, weights_only=True)
    resumed = _Run(dtype)
    resumed.step(99)
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    for group in run.optimizer.param_groups + resumed.optimizer.param_groups:
        group["lr"] *= 2
    for step in range(3, 6):
        run.step(step)
        resumed.step(step)
    _assert_equal_bits(resumed.everything(), run.everything())


def test_a_closure_is_called_once() -> None:
    run, calls = _Run(), list[None]()

    def closure() -> float:
        calls.append(None)
        run.optimizer.zero_grad()
        loss = run.loss(0)
        loss.backward()
        return loss.item()

    twin = _Run()
    assert run.optimizer.step(closure) == twin.step(0)
    assert len(calls) == 1
    _assert_equal_bits(run.everything(), twin.everything())


def test_tables_move_to_another_dtype_before_the_optimizer_is_built() -> None:
    table = ValueTable(4, 2)
    table.hide()
    optimizer = RowAdam([table.to(torch.float64)])
    table.weighted_sum(torch.tensor([[1]]), torch.ones(1, 1).double()).sum().backward()
    optimizer.step()
    assert table.weight.dtype == optimizer.state[table.anchor]["exp_avg"].dtype == torch.float64


def test_what_is_no_optimizer_is_named() -> None:
    with pytest.raises(ValueError, match="no optimizers"):
        CombinedOptimizer()
    model = nn.Linear(2, 2)
    dense = AdamW(model.parameters())
    for wrong in ([dense], 1, model):
        with pytest.raises(TypeError, match=f"takes optimizers, not {type(wrong).__name__}"):
            CombinedOptimizer(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LBFGS runs the model several times a step"):
        CombinedOptimizer(torch.optim.LBFGS(model.parameters()))


def test_an_optimizer_of_combined_ones_loads_what_it_saved() -> None:
    """And a schedule reaches all of them after that."""
    ends = []
    for resumed in (False, True):
        run, head = _Run(), nn.Linear(1, 1)
        run.model.append(head)
        run.optimizer = CombinedOptimizer(run.optimizer, AdamW(head.parameters(), 0.01))
        for step in range(2):
            run.step(step)
        if resumed:
            state = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
            run, head = _Run(), nn.Linear(1, 1)
            run.model.append(head)
            run.optimizer = CombinedOptimizer(run.optimizer, AdamW(head.parameters(), 0.01))
            run.model.load_state_dict(state[0])
            run.optimizer.load_state_dict(state[1])
        for group in run.optimizer.param_groups:
            group["lr"] *= 0.5
        for step in range(2, 4):
            run.step(step)
        ends.append(run.model.state_dict())
    torch.testing.assert_close(*ends, rtol=0, atol=0)
