import pytest
import torch
from torch import Tensor

from memshard.models.context import Context
from memshard.models.mixers.softmax import SoftmaxMixer

BATCH, LENGTH, DIM, HEADS = 2, 7, 12, 3


def _naive(mixer: SoftmaxMixer, x: Tensor, ctx: Context) -> Tensor:
    """Attend with one query at a time, over the keys it may see; rotation is a multiplication of
    complex numbers.
    """
    out = torch.zeros_like(x)
    q, k, v = (
        (x @ p.weight.T).view(BATCH, LENGTH, HEADS, -1)
        for p in (mixer.query, mixer.key, mixer.value)
    )
    if mixer.rotary:
        half = DIM // HEADS // 2
        angle = ctx.positions[..., None, None] * (10_000.0 ** (-torch.arange(half) / half)).double()
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.complex(h[..., :half], h[..., half:]) * turn for h in (q, k))
        q, k = (torch.cat((h.real, h.imag), dim=-1) for h in (q, k))
    for b in range(BATCH):
        for t in range(LENGTH):
            seen = [
                s
                for s in range(t + 1)
                if s == t
                or (
                    (ctx.documents is None or ctx.documents[b, s] == ctx.documents[b, t])
                    and (ctx.padding is None or ctx.padding[b, s])
                )
            ]
            for h in range(HEADS):
                weights = (k[b, seen, h] @ q[b, t, h] / (DIM // HEADS) ** 0.5).softmax(0)
                out[b, t, h * DIM // HEADS : (h + 1) * DIM // HEADS] = weights @ v[b, seen, h]
    return out @ mixer.output.weight.T


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_attention(rotary: bool, masked: bool) -> None:
    torch.manual_seed(0)
    mixer = SoftmaxMixer(DIM, HEADS, rotary).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.mul_(20)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 0, 1, 2]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, 3, 3]]) if masked else None
    padding = (
        torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]]).bool() if masked else None
    )
    ctx = Context(positions, documents=documents, padding=padding)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    ours, naive = mixer(x, ctx)[0], _naive(mixer, x, ctx)
    # Angles are fp32 in the layer, fp64 here.
    tolerance = 1e-5 if rotary else 1e-10
    torch.testing.assert_close(ours, naive, rtol=tolerance, atol=tolerance)
    inputs = [x, *mixer.parameters()]
    gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (ours, naive))
    torch.testing.assert_close(
        *(list(g) for g in gradients), rtol=10 * tolerance, atol=10 * tolerance
    )
