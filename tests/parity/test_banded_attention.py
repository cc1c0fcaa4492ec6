"""Sorted, tiled attention is attention over the union of each round's predecessors, one token
at a time.
"""

import pytest
import torch
from torch import Tensor

from memshard.models.kernels import cpu_banded
from memshard.models.lsh import banded
from memshard.models.lsh.banded import banded_attention
from memshard.models.lsh.bucket_order import order_tokens

ROWS, DIM = 3, 6


def _naive(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, window: int, itself: bool) -> Tensor:
    out = []
    for row, i in ((row, i) for row in range(len(q)) for i in range(q.shape[1])):
        seen = set()
        for numbers in groups[row].tolist():
            seen |= set([j for j in range(i + itself) if numbers[j] == numbers[i]][-window:])
        chosen = sorted(seen)
        out.append(
            (k[row, chosen] @ q[row, i]).softmax(0) @ v[row, chosen] if chosen else v[row, i]
        )
    return torch.stack(out).view(len(q), -1, v.shape[-1])


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize(
    ("length", "chunk", "window", "rounds", "buckets"),
    [
        (1, 4, 4, 1, 1),
        (7, 4, 4, 1, 2),
        (33, 4, 3, 2, 3),
        (50, 8, 8, 3, 2),
        (64, 8, 5, 4, 9),
        (100, 16, 1, 2, 40),
    ],
)
def test_banded_attention(
    length: int, chunk: int, window: int, rounds: int, buckets: int, itself: bool
) -> None:
    torch.manual_seed(length)
    q, k, v = (
        torch.randn(ROWS, length, DIM, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    groups = torch.randint(buckets, (ROWS, rounds, length))
    ours = banded_attention(q, k, v, groups, window, chunk, itself)
    naive = _naive(q, k, v, groups, window, itself)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-12)
    single = banded_attention(q.float(), k.float(), v.float(), groups, window, chunk, itself)
    torch.testing.assert_close(single.double(), naive, rtol=1e-6, atol=1e-6)
    probe = torch.randn_like(naive)
    gradients = [
        torch.autograd.grad((y * probe).sum(), (q, k, v), allow_unused=True, materialize_grads=True)
        for y in (ours, naive)
    ]
    torch.testing.assert_close(*(list(g) for g in gradients), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lonely_token_gets_its_own_value_in_every_precision(dtype: torch.dtype) -> None:
    """Published code multiplies it by the number of rounds in half precision."""
    v = torch.randn(1, 40, DIM).to(dtype)
    groups = torch.arange(40).expand(1, 4, 40)
    assert torch.equal(banded_attention(v, v, v, groups, 8, 8), v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(900, 32, 4, 64, 3), (60, 5, 1, 4, 2), (150, 50, 2, 16, 7), (280, 69, 3, 32, 5)]
)
def test_the_future_changes_nothing_of_the_past(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """No bit with the compiled kernel, and nothing but rounding in plain torch."""
    length, dim, rounds, chunk, buckets = sizes
    torch.manual_seed(length)
    cut = length // 2
    q, v = (torch.randn(2, length, dim, dtype=torch.float64).to(dtype) for _ in range(2))
    groups = torch.randint(buckets, (2, rounds, length))
    before = banded_attention(q, q, v, groups, chunk, chunk)
    q[:, cut:], v[:, cut:] = 7.0, -3.0
    groups[:, :, cut:] = torch.randint(buckets, (2, rounds, length - cut))
    after = banded_attention(q, q, v, groups, chunk, chunk)
    if banded._serves(q):
        assert torch.equal(before[:, :cut], after[:, :cut])
    rounding = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(before[:, :cut], after[:, :cut], rtol=rounding, atol=rounding)
    assert not torch.equal(before[:, cut:], after[:, cut:])


def test_autocast_leaves_sums_of_weights_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "_serves", lambda q: False)
    q, v, groups = (
        torch.randn(2, 300, 32).bfloat16(),
        torch.randn(2, 300, 32).bfloat16(),
        torch.randint(3, (2, 4, 300)),
    )
    expected = banded_attention(q, q, v, groups, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(banded_attention(q, q, v, groups, 64, 64), expected)


def test_a_window_beyond_the_chunk_is_refused() -> None:
    x = torch.randn(1, 8, 4)
    with pytest.raises(ValueError, match="between 1 and the chunk"):
        banded_attention(x, x, x, torch.zeros(1, 1, 8, dtype=torch.long), 5, 4)


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 4, 4, 1, 1), (50, 8, 5, 33, 5), (300, 64, 64, 64, 140), (130, 16, 1, 16, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_kernel_is_plain_torch(
    dtype: torch.dtype, sizes: tuple[int, ...], itself: bool
) -> None:
    length, chunk, window, dim, width = sizes
    if cpu_banded.kernel() is None:
        pytest.skip("no compiler")
    torch.manual_seed(length)
    q, k, v, d_out = (torch.randn(2, length, size).to(dtype) for size in (dim, dim, width, width))
    k = torch.nn.functional.normalize(k, dim=-1)
    orders = order_tokens(torch.randint(4, (2, 3, length)), window, chunk)
    out, logs = cpu_banded.forward(q, k, v, orders, window, chunk, itself)
    ours = out, logs, *cpu_banded.backward(q, k, v, orders, out, logs, d_out, window, chunk, itself)
    exact = [x.double() for x in (q, k, v, out, logs, d_out)]
    theirs = banded._forward(*exact[:3], orders, window, chunk, itself)
    theirs = *theirs, *banded._backward(*exact[:3], orders, *exact[3:], window, chunk, itself)
    tolerance = 1e-4 if dtype == torch.float32 else 0.01
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
