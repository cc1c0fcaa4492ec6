"""Promises of fast weights beyond their equations: streams, stability, memory, feature maps."""

import pytest
import torch
import torch.nn.functional as F

from memshard.models.fast_weights.delta_rule import delta_rule
from memshard.models.fast_weights.feature_maps import FeatureMap, dpfp, elu_plus_one
from memshard.models.fast_weights.sum_rule import sum_rule


def test_any_split_of_a_stream_gives_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 200, 8, dtype=torch.float64) for _ in range(3))
    k, beta = F.normalize(k, dim=-1), torch.rand(2, 2, 200, dtype=torch.float64)
    whole, last = delta_rule(q, k, v, beta)
    state, parts = None, []
    for first, end in [(0, 1), (1, 2), (2, 90), (90, 131), (131, 200)]:
        out, state = delta_rule(*(x[:, :, first:end] for x in (q, k, v, beta)), state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_a_long_stream_stays_bounded() -> None:
    """200,000 random tokens: the delta rule's state has the size of a few values, the sum rule's
    grows with the stream.
    """
    torch.manual_seed(0)
    features = FeatureMap("elu", 16)
    delta, total = None, None
    for _ in range(20):
        k, v = features(torch.randn(1, 1, 10_000, 16)), torch.randn(1, 1, 10_000, 16)
        beta = torch.rand(1, 1, 10_000)
        out, delta = delta_rule(k, k, v, beta, delta)
        total = sum_rule(k, k, v, total)[1]
    assert out.isfinite().all() and float(delta.norm()) < 40 < float(total.norm())


def test_memory_grows_with_the_length() -> None:
    """Autograd keeps four times as much for four times the tokens, and no [length, dim,
    dim] tensor.
    """

    def kept(length: int) -> int:
        total = 0

        def count(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        inputs = [torch.randn(1, 2, length, 32).requires_grad_() for _ in range(3)]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            delta_rule(*inputs, torch.rand(1, 2, length))
        return total

    short, long = kept(512), kept(2048)
    assert long <= 4.1 * short
    assert long < 2 * 2048 * 32 * 32 * 4 / 4


@pytest.mark.parametrize("kind", ["elu", "dpfp", "favor"])
@pytest.mark.parametrize("normalise", ["sum", "l2"])
def test_features_are_not_negative_and_have_their_norm(kind: str, normalise: str) -> None:
    torch.manual_seed(0)
    features = FeatureMap(kind, 8, width=2, normalise=normalise)
    y = features(torch.randn(3, 100, 8, dtype=torch.bfloat16) * 30)
    assert y.shape == (3, 100, features.features) and y.dtype == torch.float32 and (y >= 0).all()
    norm = y.sum(-1) if normalise == "sum" else y.norm(dim=-1)
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-4, atol=1e-4)


def test_dpfp_is_equation_37() -> None:
    x = torch.tensor([1.0, -2.0])
    r = [1.0, 0.0, 0.0, 2.0]
    expected = [r[i] * r[(i - shift) % 4] for shift in (1, 2) for i in range(4)]
    assert FeatureMap("dpfp", 2, width=2, normalise="none")(x).tolist() == expected


@pytest.mark.parametrize("width", [1, 3])
def test_sum_normalised_dpfp_is_the_published_code(width: int) -> None:
    """IDSIA/lmtool-fwp, src/utils/cuda_fast_weight_layer.py: features by `mul_roll_repeat`, divided
    by their sum; also of keys that have next to no features, as heads of width 2 often do.
    """
    small = torch.logspace(-5, 0, 50, dtype=torch.float64)
    x = torch.stack((torch.full_like(small, 3), 3 * small), 1) * torch.tensor([[1], [-1]])[:, None]
    published = dpfp(x, width)
    published = published / published.sum(-1, keepdim=True)
    ours = FeatureMap("dpfp", 2, width)(x)
    torch.testing.assert_close(ours, published, rtol=1e-12, atol=1e-15)


def test_a_zero_vector_gives_zero_features_and_gradients() -> None:
    x = torch.zeros(1, 8, requires_grad=True)
    y = FeatureMap("dpfp", 8)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not y.any() and gradient.isfinite().all()


def test_dpfp_refuses_an_odd_width() -> None:
    with pytest.raises(ValueError, match="even width"):
        FeatureMap("dpfp", 7)


def test_elu_keeps_small_values_in_half_precision() -> None:
    x = torch.tensor([-8.0], dtype=torch.bfloat16)
    assert 3e-4 < float(elu_plus_one(x)) < 4e-4


def test_elu_plus_one_has_the_branches_values_and_gradients() -> None:
    x = torch.tensor(
        [-800.0, -3.0, -1e-9, 0.0, 1e-9, 2.0, 800.0], dtype=torch.float64, requires_grad=True
    )
    branches = torch.where(x >= 0, x + 1, x.clamp(max=0).exp())
    torch.testing.assert_close(elu_plus_one(x), branches, rtol=1e-15, atol=0)
    (ours,), (theirs,) = (
        torch.autograd.grad(y.cos().sum(), x) for y in (elu_plus_one(x), branches)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=0)
    assert torch.autograd.gradgradcheck(
        elu_plus_one, torch.tensor([-2.0, -0.5, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    )


def test_l2_normalised_keys_are_overwritten_exactly() -> None:
    torch.manual_seed(0)
    k = FeatureMap("dpfp", 8, normalise="l2")(torch.randn(1, 1, 1, 8, dtype=torch.float64)).expand(
        1, 1, 3, -1
    )
    v = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    out, _ = delta_rule(k, k, v, torch.ones(1, 1, 3, dtype=torch.float64))
    torch.testing.assert_close(out, v)
