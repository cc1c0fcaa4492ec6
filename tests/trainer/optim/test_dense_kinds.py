"""The rows of the dense optimizers' registry say what torch's optimizers do."""

import math

import pytest
import torch

from memshard.trainer.config.optimizers import OptimizerConfig
from memshard.trainer.optim.dense.build import build_dense_optimizer, make_states
from memshard.trainer.optim.dense.kinds import DENSE_KINDS, DenseKind


@pytest.mark.parametrize("kind", DENSE_KINDS.values(), ids=lambda kind: kind.name)
def test_a_row_names_the_states_that_the_first_step_makes(kind: DenseKind) -> None:
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 4), (5,)))
    optimizer, prepared = (
        build_dense_optimizer([matrix, vector], OptimizerConfig(kind=kind.name)) for _ in range(2)
    )
    for parameter in (matrix, vector):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    make_states(prepared, kind, (matrix, vector))
    for parameter in (matrix, vector):
        ours, torchs = prepared.state[parameter], optimizer.state[parameter]
        facts = [
            {name: (value.shape, value.dtype) for name, value in state.items()}
            for state in (ours, torchs)
        ]
        assert facts[0] == facts[1]
        assert not any(value.any() for value in ours.values())


@pytest.mark.parametrize("kind", DENSE_KINDS.values(), ids=lambda kind: kind.name)
def test_the_planners_bytes_are_those_of_the_states(kind: DenseKind) -> None:
    moments = kind.moments((256, 64))
    assert kind.state_bytes * 256 * 64 == 4 * sum(math.prod(shape) for shape in moments.values())
    assert kind.update_bytes >= kind.state_bytes
