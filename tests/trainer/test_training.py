"""Training without a run: a module of one's own, any torch optimizer, steps that are left out."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import find_tables
from memshard.trainer.config.optimizers import TableOptimizerConfig
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.training import Training, build_for_training, training_step

DIM = 8


class Model(nn.Module):
    """A linear map and a memory beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.memory = ProductKeyMemory(DIM, keys=8, heads=2, topk=4, key_dim=8, query_norm="batch")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.memory(x)


def _model() -> Model:
    torch.manual_seed(0)
    return Model()


def _batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, DIM, generator=draw), torch.randn(6, DIM, generator=draw)) for _ in range(2)
    ]


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return F.mse_loss(model(x), target) / 2


def _training(model: nn.Module, clip: float = 0.0) -> Training:
    return build_for_training(
        model,
        lambda parameters: torch.optim.SGD(parameters, 0.5),
        TableOptimizerConfig(lr=0.1),
        TrainConfig(precision="fp32", clip=clip),
    )


def _tensors(training: Training) -> dict[str, Tensor]:
    tensors = {**training.model.state_dict(), **dict(training.model.named_buffers())}
    rows = training.table_optimizer
    assert rows is not None
    states = rows.state[rows.tables[0].anchor]
    tensors |= {key: value for key, value in states.items() if isinstance(value, Tensor)}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_a_module_trains_in_place_with_a_torch_optimizer() -> None:
    model, twin = _model(), _model()
    twin.memory.query_norm.deferred = True  # as in training: statistics of both micro-batches
    expected = sum(_loss(twin, batch) for batch in _batches())
    assert isinstance(expected, Tensor)
    expected.backward()
    training = _training(model)
    assert training.model is model and training.query_norms[0] is not None
    assert "memory.values.weight" not in dict(model.named_parameters())
    outcome = training_step(training, _batches(), _loss, 0)
    assert outcome.loss == pytest.approx(expected.item(), rel=1e-6)
    assert (outcome.skipped, outcome.rate) == (False, 0.5)
    for name, weight in twin.linear.named_parameters():
        assert weight.grad is not None
        after = model.linear.get_parameter(name)
        torch.testing.assert_close(after, weight - 0.5 * weight.grad)
    ((_, table),) = find_tables(model)
    gradient = twin.memory.values.weight.grad
    assert gradient is not None
    moved = (table.weight != twin.memory.values.weight).any(1)
    assert torch.equal(moved, (gradient != 0).any(1))
    losses = [training_step(training, _batches(), _loss, step).loss for step in range(1, 20)]
    assert losses[-1] < outcome.loss / 2


@pytest.mark.parametrize("why", ["not accepted", "not finite"])
def test_a_step_that_is_left_out_changes_nothing(why: str) -> None:
    training = _training(_model())
    training_step(training, _batches(), _loss, 0)
    before = _tensors(training)
    batches = deepcopy(_batches())
    if why == "not finite":
        batches[1][1][0, 0] = torch.inf
    outcome = training_step(training, batches, _loss, 1, accept=lambda _: why == "not finite")
    assert (outcome.skipped, outcome.rate, outcome.overflow) == (True, 0.0, why == "not finite")
    after = _tensors(training)
    assert after.keys() == before.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    # Nothing of the step is left over: the next ones are those of a training without it.
    twin = _training(_model())
    training_step(twin, _batches(), _loss, 0)
    for one in (training, twin):
        training_step(one, _batches(), _loss, 1)
    first, second = _tensors(training), _tensors(twin)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_deepspeed_needs_settings() -> None:
    with pytest.raises(ValueError, match="train.engine is deepspeed, which needs an Optimizer"):
        build_for_training(
            _model(), lambda p: torch.optim.SGD(p, 0.1), train=TrainConfig(engine="deepspeed")
        )
