"""LSH attention some heads at a time, norm and output projection included, is that of all heads at
once, and holds a few arrays.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memshard.models.config import MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.kernels import cpu_banded
from memshard.models.lsh import by_heads, hashing
from memshard.models.mixers.lsh import LSHMixer
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.recompute.grid import Grid
from memshard.models.recompute.reversible import reversible_blocks
from memshard.models.transformer import Transformer
from tests.live_bytes import LiveBytes
from tests.models.tiny import tiny_config, tiny_model

BATCH, LENGTH, DIM, HEADS = 2, 19, 12, 3


def _branch(
    heads_at_once: int, x: Tensor, norm: nn.Module, ctx: Context, inside: bool, convolution: int = 0
) -> list[Tensor]:
    torch.manual_seed(1)
    mixer = LSHMixer(
        DIM,
        HEADS,
        rounds=2,
        chunk=4,
        buckets=2,
        heads_at_once=heads_at_once,
        convolution=convolution,
    ).to(x.dtype)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    leaf = x.detach().requires_grad_()
    norm.zero_grad()
    y, _ = mixer(leaf, ctx, None, norm) if inside else mixer(norm(leaf), ctx)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    return [
        y,
        leaf.grad,
        *(parameter.grad for parameter in (*mixer.parameters(), *norm.parameters())),
    ]


@pytest.mark.parametrize("which", ["plain", "documents", "padding"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("heads_at_once", "convolution"), [(1, 0), (2, 3), (3, 7)])
def test_heads_at_once(
    heads_at_once: int, convolution: int, kind: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_heads, "SPAN", 5)
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    norm = (nn.LayerNorm(DIM) if kind == "layer" else nn.RMSNorm(DIM)).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    ctx = Context(
        positions,
        documents=positions // 7 if which == "documents" else None,
        padding=positions < torch.tensor([LENGTH, 8])[:, None] if which == "padding" else None,
    )
    whole = _branch(0, x, norm, ctx, False, convolution)
    for inside in (False, True):
        torch.testing.assert_close(
            _branch(heads_at_once, x, norm, ctx, inside, convolution), whole, rtol=1e-12, atol=1e-12
        )
    with torch.autocast("cpu", torch.bfloat16):
        half = [
            _branch(heads, x.float(), norm.float(), ctx, heads > 0, convolution)
            for heads in (0, heads_at_once)
        ]
    assert half[0][0].dtype == half[1][0].dtype == torch.bfloat16
    for ours, theirs in zip(*half, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_frozen_weights_get_no_gradient() -> None:
    torch.manual_seed(0)
    mixer, norm = LSHMixer(DIM, HEADS, 2, chunk=4, heads_at_once=1), nn.LayerNorm(DIM)
    for parameter in (mixer.value.weight, norm.bias):
        parameter.requires_grad_(False)
    x = torch.randn(BATCH, LENGTH, DIM)
    mixer(x, Context.of(x[..., 0]), None, norm)[0].sum().backward()
    assert mixer.value.weight.grad is norm.bias.grad is None
    assert (
        mixer.query.weight.grad is not None
        and mixer.output.weight.grad is not None
        and norm.weight.grad is not None
    )


@pytest.mark.skipif(
    cpu_banded.kernel() is None, reason="plain torch holds whole score blocks of a span"
)
def test_a_step_holds_both_streams_their_gradients_and_one_branch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is counted in arrays of [length, dim] fp32. Pieces and weights are small beside them, as
    at a million tokens.
    """
    monkeypatch.setattr(by_heads, "SPAN", 64)
    monkeypatch.setattr(hashing, "_HASH_BLOCK", 64)
    length, dim, heads = 2048, 128, 16
    config = ModelConfig(
        vocab_size=8,
        layers=3,
        dim=dim,
        max_length=length,
        mixer=MixerConfig(kind="lsh", heads=heads, chunk=16, heads_at_once=1),
        position="axial",
        residual="reversible",
        tie_head=False,
    )
    model = Transformer(config).train()
    model.configure(Recompute(chunk=64))
    tokens = torch.randint(8, (1, length + 1))
    gradients = sum(parameter.numel() for parameter in model.parameters()) * 4
    with LiveBytes() as live:
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])[0].mean()
        assert live.peak < 5 * length * dim * 4
        loss.backward()
    assert live.peak - gradients < 6.6 * length * dim * 4


@pytest.mark.parametrize(
    "changes",
    [{"memory": {"mode": "add", "query_norm": "layer"}}, {"memory": {"layers": ()}}],
    ids=str,
)
def test_one_gradient_for_both_streams_is_not_written_to(changes: dict[str, Any]) -> None:
    """The last block's gradients belong to whoever made them; its outputs may be used by one graph
    only, or by one that is kept.
    """
    model = tiny_model(
        tiny_config(
            residual="reversible", mixer={"kind": "lsh", "chunk": 4, "heads_at_once": 1}, **changes
        )
    ).train()
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    direct, upstream = torch.randn(2, 2, 9, 16, dtype=torch.float64, requires_grad=True).unbind()
    direct = direct.detach().requires_grad_()
    ctx = Context.of(x[..., 0])
    gradients = []
    for keep in (True, False):
        assert isinstance(model.grid, Grid)
        y1, y2, _ = reversible_blocks(model.blocks, model.grid, x, ctx)
        before = y1.detach().clone()
        # The same gradient for y1, y2 and somebody else.
        gradients.append(
            torch.autograd.grad(y1 + y2 + direct, (x, direct), upstream, retain_graph=keep)
        )
        assert torch.equal(gradients[-1][1], upstream) and torch.equal(y1, before) == keep
    assert torch.equal(gradients[0][0], gradients[1][0])

    y1, y2, _ = reversible_blocks(model.blocks, model.grid, x, ctx)
    other = (y1 * direct).sum()
    (y1 + y2).sum().backward()
    with pytest.raises(RuntimeError, match="modified inplace"):
        other.backward()
