"""What a position must not see: later tokens, and other documents."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from memshard.models.context import Context
from memshard.models.kernels import cpu_banded
from memshard.models.mixers.lsh import LSHMixer
from memshard.models.random import RandomKey
from memshard.models.transformer import Transformer
from tests.models.tiny import MIXERS, tiny_config, tiny_model, tiny_tokens

LENGTH, CHANGED = 10, 6
_QUERY_NORMS = ["batch", "layer", "rms", "lagged", "none"]


def _past_is_equal(model: Transformer, deferred: bool = False, rounding: float = 0) -> bool:
    """Return whether logits before CHANGED keep their bits when the tokens from there on change, or
    differ by `rounding` at most. Each pass starts from the same model.
    """
    tokens, other = tiny_tokens(2, LENGTH), tiny_tokens(2, LENGTH, seed=5)
    other[:, :CHANGED] = tokens[:, :CHANGED]
    ctx = Context(torch.arange(LENGTH).expand(2, -1), random=RandomKey(0, 0, torch.arange(2)))
    logits = []
    for x in (tokens, other):
        copy = deepcopy(model)
        for _, memory in copy.memories():
            memory.query_norm.deferred = deferred
        logits.append(copy(x, ctx)[0])
    assert not torch.equal(logits[0][:, CHANGED:], logits[1][:, CHANGED:])
    return bool((logits[0] - logits[1])[:, :CHANGED].abs().max() <= rounding)


@pytest.mark.parametrize("query_norm", _QUERY_NORMS)
@pytest.mark.parametrize("changes", [{"position": "rotary"}, {"residual": "post"}], ids=str)
def test_evaluation_is_causal(query_norm: str, changes: dict[str, Any]) -> None:
    assert _past_is_equal(tiny_model(tiny_config({"query_norm": query_norm}, **changes)).eval())


@pytest.mark.parametrize("query_norm", ["layer", "rms", "lagged", "none"])
@pytest.mark.parametrize("deferred", [False, True])
def test_training_is_causal(query_norm: str, deferred: bool) -> None:
    model = tiny_model(tiny_config({"query_norm": query_norm}, dropout=0.2)).train()
    assert _past_is_equal(model, deferred)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_are_causal(mixer: str, dtype: torch.dtype) -> None:
    """In fp32, LSH and local attention take the compiled kernel where there is a compiler; in plain
    torch, sums over LSH's buckets may be rounded in another way.
    """
    model = tiny_model(tiny_config({"query_norm": "layer"}, mixer=MIXERS[mixer], dropout=0.2))
    hashes = any(isinstance(block.mixer, LSHMixer) for block in model.blocks)
    plain = dtype == torch.float64 or cpu_banded.kernel() is None
    rounding = 1e3 * torch.finfo(dtype).eps if hashes and plain else 0
    assert _past_is_equal(model.to(dtype).train(), rounding=rounding)


@pytest.mark.parametrize(
    ("query_norm", "mixer"), [("lagged", "softmax"), *(("layer", mixer) for mixer in MIXERS)]
)
def test_documents_leak_neither_values_nor_gradients(query_norm: str, mixer: str) -> None:
    model = tiny_model(
        tiny_config({"query_norm": query_norm}, mixer=MIXERS[mixer], tie_head=False)
    ).train()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])
    ctx = Context(torch.arange(LENGTH)[None], documents=documents)
    middle = documents[0] == 1
    # Tokens of the middle document are even, of its neighbours odd.
    tokens = tiny_tokens(1, LENGTH) % 11 * 2 + (~middle).long()
    other = torch.where(middle, tokens, (tokens + 2) % 22)
    copy = deepcopy(model)
    logits = model(tokens, ctx)[0][:, middle]
    assert torch.equal(logits, copy(other, ctx)[0][:, middle])
    logits.square().sum().backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None and model.positions is not None
    assert gradient[tokens[0, middle]].any(-1).all()
    assert not gradient[1::2].any()
    places = dict(model.positions.named_parameters())["weight"].grad
    assert places is not None and not places[:LENGTH][~middle].any()
