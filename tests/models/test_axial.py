"""Axial positions: a table row for every digit."""

import pytest
import torch

from memshard.models.config import ModelConfig
from memshard.models.layers.position import AxialPositions, near_square
from memshard.models.transformer import Transformer
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens


def test_positions_are_their_digits_rows() -> None:
    axial = AxialPositions((3, 4, 2), 8)
    weights = [axis.weight for axis in axial.axes]
    assert [weight.shape for weight in weights] == [(3, 3), (4, 3), (2, 2)]
    positions = torch.randint(24, (2, 5))
    expected = [
        torch.cat((weights[0][p // 8], weights[1][p // 2 % 4], weights[2][p % 2]))
        for p in positions.flatten().tolist()
    ]
    assert torch.equal(axial(positions), torch.stack(expected).view(2, 5, 8))
    assert len(axial(torch.arange(24)).unique(dim=0)) == 24


def test_any_length_up_to_the_product() -> None:
    model = tiny_model(tiny_config(position="axial", axial=(3, 5), max_length=15))
    for length in (1, 4, 7, 15):
        assert model(tiny_tokens(2, length))[0].shape == (2, length, 23)
    assert near_square(40) == (5, 8) and all(
        a * b >= n > (a - 1) * b for n in range(1, 3000) for a, b in [near_square(n)]
    )
    assert ModelConfig(position="axial", axial=(64, 32)).longest(100) == 2048
    assert (
        sum(
            p.numel()
            for p in Transformer(
                tiny_config(position="axial", max_length=1 << 20)
            ).positions.parameters()
        )
        == 2048 * 8
    )  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes",
    [
        {"axial": (4, 4)},
        {"position": "axial", "axial": (0, 4)},
        {"position": "axial", "axial": (4, 4)},
    ],
)
def test_lengths_that_do_not_fit_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"model\.axial"):
        ModelConfig(max_length=32, **changes)
