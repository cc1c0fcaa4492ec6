"""Attention without an order in time against loops over queries and heads."""

import pytest
import torch
from torch import Tensor

from memshard.models.context import Context
from memshard.models.fast_weights.feature_maps import FeatureMap
from memshard.models.mixers.bidirectional import BidirectionalMixer

DIM, HEADS, WIDTH = 12, 3, 4


def _naive(mixer: BidirectionalMixer, x: Tensor, source: Tensor, real: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for b in range(len(x)):
        seen = source[b, real[b]]
        for h in range(HEADS):
            part = slice(h * WIDTH, (h + 1) * WIDTH)
            q, k, v = (
                x[b] @ mixer.query.weight[part].T,
                seen @ mixer.key.weight[part].T,
                seen @ mixer.value.weight[part].T,
            )
            for t in range(x.shape[1]):
                if mixer.features is None:
                    weights = (k @ q[t] / WIDTH**0.5).softmax(0)
                else:
                    weights = mixer.features(k) @ mixer.features(q[t])
                    weights = weights / (weights.sum() + 1e-6)
                out[b, t, part] = weights @ v
    return out @ mixer.output.weight.T


@pytest.mark.parametrize(
    "features",
    [None, FeatureMap("elu", WIDTH, normalise="none"), FeatureMap("dpfp", WIDTH, 2, "none")],
)
@pytest.mark.parametrize("cross", [False, True])
def test_attention_to_everything(features: FeatureMap | None, cross: bool) -> None:
    torch.manual_seed(0)
    mixer = BidirectionalMixer(DIM, HEADS, features, cross).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.mul_(20)
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    source = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True) if cross else x
    real = torch.arange(source.shape[1]) < torch.tensor([4, source.shape[1]])[:, None]
    positions = torch.arange(5).expand(2, -1)
    ctx = (
        Context(positions, source=source, source_padding=real)
        if cross
        else Context(positions, padding=real)
    )
    ours, naive = mixer(x, ctx)[0], _naive(mixer, x, source, real)
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)
    inputs = [x, *([source] if cross else []), *mixer.parameters()]
    gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (ours, naive))
    torch.testing.assert_close(*map(list, gradients), rtol=1e-9, atol=1e-9)
