"""An encoder-decoder: its cached decoding, its padding, its masked-token sibling."""

from typing import Any

import pytest
import torch

from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.seq2seq import EncoderDecoder, build_model
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens

ATTENTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "linear": {"kind": "linear"},
    "dpfp": {"kind": "linear", "features": "dpfp", "feature_width": 2},
    "favor": {"kind": "linear", "features": "favor", "feature_width": 8},
    "delta": {"kind": "delta"},
    "local decoder": {
        "pattern": ("softmax", "softmax", "local", "lsh"),
        "window": 3,
        "chunk": 2,
        "buckets": 4,
    },
}


def translation_config(attention: str, **changes: Any) -> ModelConfig:
    """Return a config of two layers of encoder and two of decoder, a memory in the last of each."""
    return tiny_config(
        {"layers": (1, 3)},
        mixer=ATTENTIONS[attention],
        **{"layers": 4, "encoder_layers": 2} | changes,
    )


def translator(attention: str, **changes: Any) -> EncoderDecoder:
    model = tiny_model(translation_config(attention, **changes)).eval()
    assert isinstance(model, EncoderDecoder)
    return model


def _source(lengths: list[int], longest: int) -> tuple[torch.Tensor, Context]:
    positions = torch.arange(longest).expand(len(lengths), -1)
    real = positions < torch.tensor(lengths)[:, None]
    return tiny_tokens(len(lengths), longest, seed=3), Context(positions, padding=real)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "changes", [{}, {"residual": "post", "position": "rotary"}], ids=["pre", "post"]
)
@torch.no_grad()
def test_cached_decoding_of_reordered_rows_equals_the_full_forward(
    attention: str, changes: dict[str, Any]
) -> None:
    model, source, target = (
        translator(attention, **changes),
        _source([7, 3, 5], 7),
        tiny_tokens(3, 9),
    )
    full, none = model(target, source=source)
    assert none is None
    rows = torch.tensor([2, 0, 0, 1])
    _, states = model(target[:, :4], None, model.init_states(3, 9), source=source)
    logits, states = model(target[rows, 4:8], None, model.reorder(states, rows))
    last, _ = model(target[rows, 8:], None, states)
    torch.testing.assert_close(torch.cat((logits, last), 1), full[rows, 4:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_padding_of_the_source_changes_nothing(attention: str) -> None:
    model, target = translator(attention), tiny_tokens(2, 6)
    tokens, ctx = _source([4, 9], 9)
    other = torch.where(ctx.padding, tokens, (tokens + 1) % 23)
    padded, _ = model(target, source=(tokens, ctx))
    assert torch.equal(padded, model(target, source=(other, ctx))[0])
    alone, _ = model(target[:1], source=(tokens[:1, :4], Context.of(tokens[:1, :4])))
    torch.testing.assert_close(padded[:1], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["softmax", "linear", "delta"])
def test_targets_give_the_smoothed_losses_of_the_logits(attention: str) -> None:
    model, source, target = translator(attention).train(), _source([7, 3], 7), tiny_tokens(2, 6)
    model.configure(Recompute(), label_smoothing=0.1)
    predicted = tiny_tokens(2, 6, seed=8)
    predicted[1, 4:] = -100
    losses, _ = model(target, targets=predicted, source=source)
    shares = model(target, source=source)[0].log_softmax(-1)
    right = shares.gather(-1, predicted.clamp(min=0)[..., None])[..., 0]
    expected = -(0.9 * right + 0.1 * shares.mean(-1))
    torch.testing.assert_close(losses, expected.masked_fill(predicted < 0, 0))
    weights = list(model.parameters())
    gradients = [
        torch.autograd.grad(loss, weights, retain_graph=True)
        for loss in (losses.sum(), expected[predicted >= 0].sum())
    ]
    torch.testing.assert_close(*map(list, gradients))


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_checkpointing_changes_no_gradient(checkpointing: Any) -> None:
    model, source, target = translator("linear").train(), _source([7, 3], 7), tiny_tokens(2, 6)

    def gradients() -> list[torch.Tensor]:
        loss = model(target, targets=target, source=source)[0].sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    expected = gradients()
    model.configure(Recompute(checkpointing))
    torch.testing.assert_close(gradients(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["softmax", "linear", "delta"])
@torch.no_grad()
def test_an_encoder_alone_sees_all_of_a_text_and_no_padding(attention: str) -> None:
    model = tiny_model(translation_config(attention, encoder_layers=4)).eval()
    tokens, ctx = _source([4, 9], 9)
    padded, _ = model(tokens, ctx)
    alone, _ = model(tokens[:1, :4])
    torch.testing.assert_close(padded[:1, :4], alone, rtol=1e-10, atol=1e-10)
    changed = tokens.clone()
    changed[1, 8] += 1 if changed[1, 8] < 22 else -1
    assert (model(changed, ctx)[0][1, 0] != padded[1, 0]).any(), "the first token sees the last"
    with pytest.raises(ValueError, match="does not generate"):
        model.init_states(1, 4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a source"):
        translator("softmax")(tiny_tokens(1, 3))
    with pytest.raises(ValueError, match="only looks back"):
        tiny_config(mixer={"kind": "local"}, encoder_layers=1)
    with pytest.raises(ValueError, match="reversible"):
        tiny_config(encoder_layers=1, residual="reversible")
    with pytest.raises(ValueError, match="encoder_layers is 9"):
        tiny_config(encoder_layers=9)
    assert type(build_model(tiny_config())) is not EncoderDecoder
