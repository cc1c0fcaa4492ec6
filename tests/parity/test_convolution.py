"""Primer's convolutions against loops over tokens: alone, in attention, and in every
way of decoding.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.context import Context
from memshard.models.fast_weights.feature_maps import FeatureMap
from memshard.models.layers.convolution import causal_convolution, plain_convolution
from memshard.models.layers.position import rotate
from memshard.models.mixers.fast_weights import FastWeightMixer
from memshard.models.mixers.local import LocalMixer
from memshard.models.mixers.lsh import LSHMixer
from memshard.models.mixers.softmax import SoftmaxMixer

DIM, LENGTH = 16, 20
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SPLITS = [[1] * 20, [7, 1, 1, 1, 10], [1, 2, 17]]
MIXERS: dict[str, Any] = {
    "MDHA": lambda: SoftmaxMixer(DIM, 4, rotary=True, convolution=3),
    "shared, grouped": lambda: SoftmaxMixer(DIM, 4, convolution=3, share_qk=True, kv_heads=2),
    "local": lambda: LocalMixer(DIM, 2, 5, convolution=4, kv_heads=1),
    "lsh": lambda: LSHMixer(DIM, 2, 2, 3, 4, convolution=3),
    "delta": lambda: FastWeightMixer(
        DIM, 2, "delta", FeatureMap("elu", 8, 1, "sum"), convolution=3, share_qk=True
    ),
    "linear": lambda: FastWeightMixer(
        DIM, 2, "sum", FeatureMap("dpfp", 8, 1), attention_norm=True, convolution=2
    ),
}
CONTEXTS = ["plain", "documents", "left padding"]


def _naive(x: Tensor, kernel: Tensor, documents: Tensor | None = None, dilation: int = 1) -> Tensor:
    rows = []
    for row in range(len(x)):
        for t in range(x.shape[1]):
            seen = [
                (j, t - j * dilation)
                for j in range(kernel.shape[1])
                if t >= j * dilation
                and (documents is None or documents[row, t] == documents[row, t - j * dilation])
            ]
            rows.append(torch.stack([kernel[:, j] * x[row, at] for j, at in seen]).sum(0))
    return torch.stack(rows).view_as(x)


def _context(which: str, batch: int = 3) -> Context:
    positions = torch.arange(LENGTH).repeat(batch, 1)
    if which == "documents":
        documents = torch.tensor([[0] * 3 + [1] * 9 + [2] + [3] * 7, [4] * 20, [5] * 8 + [6] * 12])
        return Context(positions, documents=documents[:batch])
    if which == "left padding":
        lefts = torch.tensor([6, 0, 19])[:batch, None]
        return Context((positions - lefts).clamp(min=0), padding=positions >= lefts)
    return Context(positions)


def _part(ctx: Context, start: int, end: int) -> Context:
    documents, padding = (
        None if x is None else x[:, start:end] for x in (ctx.documents, ctx.padding)
    )
    return Context(ctx.positions[:, start:end], documents=documents, padding=padding)


def _mixer(name: str) -> Any:
    mixer = MIXERS[name]().double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return mixer


def _text(batch: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randn(
        batch, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("width", "dilation"), [(2, 1), (3, 1), (5, 1), (4, 3)])
@pytest.mark.parametrize("length", [1, 2, 20])
def test_values_and_gradients(length: int, width: int, dilation: int, packed: bool) -> None:
    torch.manual_seed(0)
    # More rows than one block takes.
    x = torch.randn(30, length, 400 if length == 20 else 3, dtype=torch.float64)[
        :, :, -7:
    ].requires_grad_()
    kernel, probe = (
        torch.randn(7 if length == 20 else 3, width, dtype=torch.float64, requires_grad=True),
        torch.randn_like(x),
    )
    documents = (torch.rand(30, length) < 0.3).cumsum(1) if packed else None
    same = (
        []
        if documents is None
        else [
            documents[:, lag:] == documents[:, :-lag]
            for lag in range(dilation, width * dilation, dilation)
        ]
    )
    theirs = _naive(x, kernel, documents, dilation)
    expected = theirs, *torch.autograd.grad((theirs * probe).sum(), (x, kernel))
    for ours in (
        causal_convolution(x, kernel, documents, dilation),
        plain_convolution(x, kernel, same, dilation),
    ):
        actual = ours, *torch.autograd.grad((ours * probe).sum(), (x, kernel))
        for mine, naive in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, naive, **EXACT)


def test_blocks_of_rows_and_grouped_conv1d() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 100, 700, dtype=torch.float64, requires_grad=True)
    kernel, probe = (
        torch.randn(700, 3, dtype=torch.float64, requires_grad=True),
        torch.randn_like(x),
    )
    theirs = F.conv1d(x.mT, kernel.flip(1)[:, None], padding=2, groups=700)[..., :100].mT
    ours = causal_convolution(x, kernel)
    torch.testing.assert_close(ours, theirs, **EXACT)
    gradients = [torch.autograd.grad((y * probe).sum(), (x, kernel)) for y in (ours, theirs)]
    for mine, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, naive, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, probe = torch.randn(4, 50, 8).to(dtype).requires_grad_(), torch.randn(4, 50, 8).to(dtype)
    kernel = torch.randn(8, 3, requires_grad=True)
    ours, exact = causal_convolution(x, kernel), _naive(x.double(), kernel.double())
    assert (
        ours.dtype == dtype
        and ((ours - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + 1e-6).all()
    )
    ours, exact = (torch.autograd.grad((y * probe).sum(), kernel)[0] for y in (ours, exact))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("which", CONTEXTS)
@pytest.mark.parametrize("name", ["MDHA", "shared, grouped"])
def test_multi_dconv_head_attention(name: str, which: str) -> None:
    """Outputs, input and parameter gradients are those of attention written out."""
    mixer, ctx, x = _mixer(name), _context(which), _text().requires_grad_()
    real = torch.ones(3, LENGTH, dtype=torch.bool) if ctx.padding is None else ctx.padding

    def convolved(projection: str, x: Tensor) -> Tensor:
        return _naive(
            getattr(mixer, projection)(x) * real[..., None],
            mixer.convolutions[projection].kernel,
            ctx.documents,
        )

    k, v = convolved("key", x), convolved("value", x)
    q = mixer.query(k) if mixer.share_qk else convolved("query", x)
    q, k, v = (part.unflatten(-1, (-1, DIM // 4)).transpose(1, 2) for part in (q, k, v))
    if mixer.rotary:
        q, k = rotate(q, ctx.positions), rotate(k, ctx.positions)
    k, v = (part.repeat_interleave(4 // part.shape[1], 1) for part in (k, v))
    seen = torch.ones(LENGTH, LENGTH).tril().bool() & real[:, None, None, :]
    if ctx.documents is not None:
        seen = seen & (ctx.documents[:, None, :, None] == ctx.documents[:, None, None, :])
    scores = (q @ k.mT * (DIM // 4) ** -0.5).masked_fill(
        ~(seen | torch.eye(LENGTH).bool()), -torch.inf
    )
    theirs = mixer.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))[real]
    ours = mixer(x, ctx)[0][real]
    torch.testing.assert_close(ours, theirs, **EXACT)
    inputs = [x, *mixer.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs)]
    for mine, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, naive, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("which", CONTEXTS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_decoding_in_pieces(name: str, split: list[int], which: str) -> None:
    mixer, ctx, x = _mixer(name), _context(which), _text()
    state, parts, start = mixer.init_state(3, LENGTH), [], 0
    for size in split:
        y, state = mixer(x[:, start : start + size], _part(ctx, start, start + size), state)
        parts.append(y)
        start += size
    real = torch.ones(3, LENGTH, dtype=torch.bool) if ctx.padding is None else ctx.padding
    torch.testing.assert_close(torch.cat(parts, 1)[real], mixer(x, ctx)[0][real], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_drafts_are_taken_back_and_beams_change_places(name: str) -> None:
    mixer, x, draft = _mixer(name), _text(2), _text(2, 3, seed=1)
    ctx, beams = replace(_context("plain", 2)), torch.tensor([1, 1, 0])
    _, state = mixer(x[:, :9], _part(ctx, 0, 9), mixer.init_state(2, LENGTH))
    # A draft of four tokens, the first of which is accepted; fast weights take back what came in
    # one call.
    _, state = mixer(torch.cat((x[:, 9:10], draft), 1), _part(ctx, 9, 13), state)
    state = mixer.reorder(mixer.rollback(state, 3), beams)
    rest, _ = mixer(x[beams, 10:], _part(_context("plain"), 10, LENGTH), state)
    torch.testing.assert_close(rest, mixer(x[beams], _context("plain"))[0][:, 10:], **EXACT)


@torch.no_grad()
def test_no_more_is_taken_back_than_is_remembered() -> None:
    mixer, x, ctx = _mixer("MDHA"), _text(), _context("plain")
    _, state = mixer(x, ctx, mixer.init_state(3, LENGTH))
    for tokens in (10, 6):
        state = mixer.rollback(state, tokens)
    again, _ = mixer(x[:, 4:], _part(ctx, 4, LENGTH), state)
    torch.testing.assert_close(again, mixer(x, ctx)[0][:, 4:], **EXACT)
    with pytest.raises(
        ValueError, match="take back at most 0 tokens here, not 1; keep the earlier state"
    ):
        mixer.rollback(state, 1)


def test_documents_leak_neither_values_nor_gradients() -> None:
    mixer, ctx, x = _mixer("MDHA"), _context("documents", 1), _text(1).requires_grad_()
    middle = ctx.documents == 1
    y = mixer(x, ctx)[0][middle]
    assert torch.equal(y, mixer(torch.where(middle[..., None], x, 9.0), ctx)[0][middle])
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient[middle].all() and not gradient[~middle].any()
