import pytest
import torch
from torch import Tensor, nn

from memshard.models.memory.query_norm import QueryNorm

HEADS, KEY_DIM = 2, 3


def _batches(count: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(7, HEADS, KEY_DIM, dtype=torch.float64) * (i + 1) + i for i in range(count)]


def _norm(kind: str) -> QueryNorm:
    return QueryNorm(kind, HEADS, KEY_DIM).double()


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_batch_is_torchs_batch_norm_in_training_and_evaluation(
    as_on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if as_on_a_gpu:
        monkeypatch.setattr(QueryNorm, "_fits_torch", lambda norm, z: norm.training)
    ours, theirs = _norm("batch"), nn.BatchNorm1d(HEADS * KEY_DIM, dtype=torch.float64)
    assert ours.weight is not None and ours.bias is not None
    with torch.no_grad():
        for mine, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            other.copy_(mine.copy_(torch.randn_like(mine)).flatten())
    for training in (True, True, False, True):
        ours.train(training)
        theirs.train(training)
        for z in _batches(2):
            x1, x2 = z.clone().requires_grad_(), z.flatten(1).requires_grad_()
            y1, y2 = ours(x1), theirs(x2)
            torch.testing.assert_close(y1.flatten(1), y2)
            upstream = torch.linspace(-1, 3, y1.numel(), dtype=z.dtype).view(y2.shape)
            g1 = torch.autograd.grad(y1.flatten(1), [x1, ours.weight, ours.bias], upstream)
            g2 = torch.autograd.grad(y2, [x2, theirs.weight, theirs.bias], upstream)
            for a, b in zip(g1, g2, strict=True):
                torch.testing.assert_close(a.flatten(), b.flatten())
        torch.testing.assert_close(ours.running_mean.flatten(), theirs.running_mean)
        torch.testing.assert_close(ours.running_var.flatten(), theirs.running_var)


@pytest.mark.parametrize("kind", ["batch", "lagged", "batch on a GPU"])
def test_deferred_statistics_wait_for_commit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "batch on a GPU":
        kind = "batch"
        monkeypatch.setattr(QueryNorm, "_fits_torch", lambda norm, z: norm.training)
    deferred, single = _norm(kind), _norm(kind)
    deferred.deferred = True
    a, b, c = _batches(3)
    deferred(a)
    deferred.discard()
    deferred.commit()
    assert not deferred.running_mean.any() and (deferred.running_var == 1).all()
    deferred(b)
    deferred(c)
    assert not deferred.running_mean.any()
    deferred.commit()
    torch.testing.assert_close(
        deferred.running_mean, 0.1 * torch.stack((b.mean(0), c.mean(0))).mean(0)
    )
    torch.testing.assert_close(
        deferred.running_var, 0.9 + 0.1 * torch.stack((b.var(0), c.var(0))).mean(0)
    )
    single(b)
    torch.testing.assert_close(single.running_mean, 0.1 * b.mean(0))


def test_lagged_sees_earlier_steps_only() -> None:
    norm = _norm("lagged")
    a, b = _batches(2)
    torch.testing.assert_close(norm(a), a, rtol=1e-5, atol=1e-5)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    expected = (b - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(norm(b), expected)
    assert not torch.equal(norm.running_mean, mean)
    norm.eval()
    torch.testing.assert_close(norm(a), (a - norm.running_mean) / (norm.running_var + 1e-5).sqrt())


@pytest.mark.parametrize("kind", ["batch", "lagged"])
def test_evaluation_moves_no_statistics(kind: str) -> None:
    norm = _norm(kind).eval()
    for z in _batches(2):
        norm(z)
    assert not norm.running_mean.any() and (norm.running_var == 1).all()


@pytest.mark.parametrize("kind", ["batch", "layer", "rms", "lagged", "none"])
def test_half_precision_queries_are_normalised_in_fp32(kind: str) -> None:
    z = (torch.randn(9, HEADS, KEY_DIM) * 300).half()
    y = QueryNorm(kind, HEADS, KEY_DIM)(z)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, QueryNorm(kind, HEADS, KEY_DIM)(z.float()))


@pytest.mark.parametrize("kind", ["batch", "lagged"])
def test_statistics_stay_in_fp32_when_the_layer_is_cast(kind: str) -> None:
    norm = QueryNorm(kind, HEADS, KEY_DIM).bfloat16()
    assert norm.weight is not None and norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    # A tenth of this difference is less than bf16 resolves beside 1.
    norm.running_mean.fill_(1)
    z = torch.full((8, HEADS, KEY_DIM), 1.01)
    norm(z)
    torch.testing.assert_close(norm.running_mean, torch.full_like(norm.running_mean, 1.001))
    kept = norm.running_mean.clone()
    assert torch.equal(norm.half().float().double().bfloat16().running_mean, kept)
    # As a loader does that sets buffers in the dtype of the weights.
    norm.running_mean = kept.bfloat16()
    norm(z)
    assert norm.running_mean.dtype == torch.float32


def test_a_batch_without_tokens_on_any_rank_moves_no_statistics() -> None:
    norm = _norm("batch")
    norm.reduce = lambda x: x.clone()
    norm(_batches(1)[0])
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    norm(_batches(1)[0][:0])
    assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)
