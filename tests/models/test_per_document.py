"""Attention document by document is attention under the document mask, without
the mask's memory.
"""

import pytest
import torch

from memshard.models.context import Context
from memshard.models.mixers import softmax
from memshard.models.mixers.softmax import SoftmaxMixer


def ragged_context(rows: int, length: int, longest: int, padding: bool) -> Context:
    draw = torch.Generator().manual_seed(0)
    documents = (torch.rand(rows, length, generator=draw) < 2 / longest).cumsum(1)
    positions = torch.arange(length).expand(rows, -1)
    real = torch.ones(rows, length, dtype=torch.bool)
    real[-1, length // 2 :] = False
    return Context(positions, documents, real if padding else None)


@pytest.mark.parametrize("padding", [False, True])
def test_outputs_and_gradients_are_those_of_the_mask(
    monkeypatch: pytest.MonkeyPatch, padding: bool
) -> None:
    torch.manual_seed(0)
    mixer = SoftmaxMixer(32, 4, rotary=True).double()
    x = torch.randn(3, 50, 32, dtype=torch.float64, requires_grad=True)
    real = ragged_context(3, 50, 12, padding).padding
    outcomes = []
    for limit in (4096, 10):
        monkeypatch.setattr(softmax, "DENSE_LENGTH", limit)
        y, _ = mixer(x, ragged_context(3, 50, 12, padding))
        y = y if real is None else y[real]
        gradients = torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])
        outcomes.append((y, *gradients))
    for dense, apart in zip(*outcomes, strict=True):
        torch.testing.assert_close(apart, dense)


def test_long_sequences_never_make_the_mask() -> None:
    ctx = ragged_context(2, 8192, 700, padding=True)
    mixer = SoftmaxMixer(16, 2)
    with torch.no_grad():
        y, _ = mixer(torch.randn(2, 8192, 16), ctx)
    assert y.isfinite().all() and "attention_mask" not in vars(ctx)
    assert [sum(sizes) for sizes in ctx.document_sizes] == [8192, 8192]


def test_rows_without_documents_are_one_stretch() -> None:
    assert Context.of(torch.zeros(2, 5, dtype=torch.long)).document_sizes == [[5], [5]]
