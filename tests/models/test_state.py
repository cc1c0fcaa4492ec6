"""A mixer with a state continues what it has seen exactly as if it saw everything at once."""

import pytest
import torch
from torch import Tensor

from memshard.models.context import Context
from memshard.models.transformer import Transformer
from tests.live_bytes import LiveBytes
from tests.models.tiny import MIXERS, tiny_config, tiny_model, tiny_tokens

LENGTH = 12
_CHUNKS = ((0, 5), (5, 6), (6, 7), (7, 11), (11, 12))


def _context(batch: int, which: str) -> Context:
    positions = torch.arange(LENGTH).repeat(batch, 1)
    if which == "plain":
        return Context(positions)
    if which == "documents":
        documents = torch.tensor(
            [[0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3], [5] * 7 + [4] * 5, [0] * 12]
        )[:batch]
        return Context(positions, documents=documents)
    lefts = torch.tensor([4, 0, 11])[:batch, None]
    return Context((positions - lefts).clamp(min=0), padding=positions >= lefts)


def _part(ctx: Context, start: int, end: int) -> Context:
    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, start:end]

    return Context(
        ctx.positions[:, start:end], documents=cut(ctx.documents), padding=cut(ctx.padding)
    )


def _model(position: str = "learned", mixer: str = "softmax") -> Transformer:
    return tiny_model(tiny_config(position=position, mixer=MIXERS[mixer])).eval()


@pytest.mark.parametrize("which", ["plain", "documents", "left padding"])
@pytest.mark.parametrize(
    ("position", "mixer"),
    [(position, "softmax") for position in ("learned", "sinusoidal", "rotary", "none")]
    + [("learned", mixer) for mixer in MIXERS if mixer != "softmax"],
)
def test_chunked_prefill_and_decode_equal_the_full_forward(
    position: str, mixer: str, which: str
) -> None:
    model, tokens, ctx = _model(position, mixer), tiny_tokens(3, LENGTH), _context(3, which)
    with torch.no_grad():
        full, none = model(tokens, ctx)
        states = model.init_states(3, LENGTH)
        parts = []
        for start, end in _CHUNKS:
            # Of plain text the model finds the positions itself.
            part = None if which == "plain" else _part(ctx, start, end)
            logits, states = model(tokens[:, start:end], part, states)
            parts.append(logits)
    assert none is None
    real = torch.ones_like(tokens).bool() if ctx.padding is None else ctx.padding
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], full[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
def test_left_padding_changes_nothing_for_the_real_tokens(mixer: str) -> None:
    model, tokens, ctx = _model(mixer=mixer), tiny_tokens(3, LENGTH), _context(3, "left padding")
    with torch.no_grad():
        padded, _ = model(tokens, ctx)
        alone, _ = model(tokens[:1, 4:])
    torch.testing.assert_close(padded[0, 4:], alone[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
def test_documents_are_independent_texts(mixer: str) -> None:
    model, tokens, ctx = _model("none", mixer), tiny_tokens(1, LENGTH), _context(1, "documents")
    with torch.no_grad():
        packed, _ = model(tokens, ctx)
        alone, _ = model(tokens[:, 2:7])
    torch.testing.assert_close(packed[:, 2:7], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_reorder(mixer: str) -> None:
    model, tokens = _model(mixer=mixer), tiny_tokens(2, LENGTH)
    rows = torch.tensor([1, 1, 0])
    full, _ = model(tokens[rows])
    _, states = model(tokens[:, :7], None, model.init_states(2, LENGTH))
    states = [
        block.mixer.reorder(state, rows) for block, state in zip(model.blocks, states, strict=True)
    ]
    rest, _ = model(tokens[rows][:, 7:], None, states)
    torch.testing.assert_close(rest, full[:, 7:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_rollback(mixer: str) -> None:
    model, tokens = _model(mixer=mixer), tiny_tokens(2, LENGTH)
    full, _ = model(tokens)
    _, states = model(tokens[:, :5], None, model.init_states(2, LENGTH))
    _, states = model(tiny_tokens(2, 2, seed=9), None, states)
    states = [
        block.mixer.rollback(state, 2) for block, state in zip(model.blocks, states, strict=True)
    ]
    rest, _ = model(tokens[:, 5:], None, states)
    torch.testing.assert_close(rest, full[:, 5:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_reset_forgets_the_given_rows_only(mixer: str) -> None:
    model, tokens = _model("rotary", mixer), tiny_tokens(2, LENGTH)
    full, _ = model(tokens)
    fresh, _ = model(tokens[1:, 5:])
    _, states = model(tokens[:, :5], None, model.init_states(2, LENGTH))
    states = [
        block.mixer.reset(state, torch.tensor([False, True]))
        for block, state in zip(model.blocks, states, strict=True)
    ]
    positions = torch.stack((torch.arange(5, LENGTH), torch.arange(LENGTH - 5)))
    rest, _ = model(tokens[:, 5:], Context(positions), states)
    torch.testing.assert_close(rest, torch.cat((full[:1, 5:], fresh)), rtol=1e-10, atol=1e-10)


def test_a_full_state_says_so() -> None:
    model = _model()
    with pytest.raises(ValueError, match="holds 4 tokens and 5 are needed"):
        model(tiny_tokens(1, 5), None, model.init_states(1, 4))


@torch.no_grad()
def test_a_token_of_lsh_costs_the_same_in_a_long_text() -> None:
    model = tiny_model(tiny_config({"layers": ()}, position="none", mixer=MIXERS["lsh"])).eval()
    peaks = []
    for length in (64, 512):
        _, states = model(tiny_tokens(1, length), None, model.init_states(1, length + 1))
        with LiveBytes() as live:
            model(tiny_tokens(1, 1), None, states)
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]
