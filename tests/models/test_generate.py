from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.data_pipeline.tokenizer import Tokenizer, train_tokenizer
from memshard.launch.cli.generate import GrowingText
from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig
from memshard.models.decode.generate import generate, left_padded, possible_tokens, restrict
from memshard.models.transformer import Transformer

VOCABULARY = 37


def build(position: Any = "learned", max_length: int = 48) -> Transformer:
    torch.manual_seed(0)
    memory = MemoryConfig(layers=(1,), keys=12, heads=2, topk=4, key_dim=8)
    config = ModelConfig(
        vocab_size=VOCABULARY,
        layers=3,
        dim=32,
        max_length=max_length,
        position=position,
        mixer=MixerConfig(heads=4),
        memory=memory,
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(
                3
            )  # Small initial weights would make every continuation repeat one token.
    return model.eval()


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "none"])
def test_cached_greedy_equals_uncached(position: str, prompt: Tensor) -> None:
    model = build(position)
    tokens = prompt
    with torch.no_grad():
        for _ in range(20):
            tokens = torch.cat((tokens, model(tokens)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    generated = generate(model, prompt, 20, temperature=0)
    assert torch.equal(generated, tokens[:, 7:])
    assert len(generated.unique()) > 5


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_prompts_of_different_lengths_are_continued_as_if_each_were_alone(
    position: str, prompt: Tensor
) -> None:
    model = build(position)
    rows = [prompt[0, :2].tolist(), prompt[1].tolist(), prompt[2, :5].tolist()]
    together = generate(
        model, *left_padded(rows, 3)[:1], 15, real=left_padded(rows, 3)[1], temperature=0
    )
    for row, continued in zip(rows, together, strict=True):
        assert torch.equal(continued, generate(model, torch.tensor([row]), 15, temperature=0)[0])


def test_a_seed_decides_the_draws(prompt: Tensor) -> None:
    model = build()
    first = generate(model, prompt, 15, seed=5)
    torch.rand(3)  # The global generator has no say.
    assert torch.equal(first, generate(model, prompt, 15, seed=5))
    assert not torch.equal(first, generate(model, prompt, 15, seed=6))


def test_draws_follow_the_model(prompt: Tensor) -> None:
    model = build()
    many = prompt[:1].expand(20_000, -1)
    with torch.no_grad():
        expected = (model(prompt[:1])[0][0, -1] / 0.7).softmax(-1)
    frequencies = torch.bincount(
        generate(model, many, 1, temperature=0.7)[:, 0], minlength=VOCABULARY
    ) / len(many)
    assert (frequencies - expected).abs().max() < 0.02


def test_topk_and_topp_leave_out_the_tail(prompt: Tensor) -> None:
    model = build()
    many = prompt[:1].expand(2000, -1)
    with torch.no_grad():
        probabilities, order = model(prompt[:1])[0][0, -1].softmax(-1).sort(descending=True)
    assert set(generate(model, many, 1, topk=3).flatten().tolist()) == set(order[:3].tolist())
    nucleus = int((probabilities.cumsum(-1) < 0.5).sum()) + 1
    assert 1 < nucleus < VOCABULARY
    assert set(generate(model, many, 1, topp=0.5).flatten().tolist()) == set(
        order[:nucleus].tolist()
    )
    assert torch.equal(
        generate(model, prompt, 5, topk=1), generate(model, prompt, 5, temperature=0)
    )
    assert torch.equal(
        generate(model, prompt, 5, topp=1e-9), generate(model, prompt, 5, temperature=0)
    )
    assert torch.equal(
        generate(model, prompt, 5, temperature=1e-30), generate(model, prompt, 5, temperature=0)
    )


def test_topk_keeps_exactly_k_of_equal_logits() -> None:
    assert int(restrict(torch.zeros(1, 9), 1.0, 4, None).isfinite().sum()) == 4


def test_stop_ends_a_row_and_then_the_batch(prompt: Tensor) -> None:
    model = build()
    free = generate(model, prompt, 20, temperature=0)
    row = free[0].tolist()
    stop = next(token for token in row[3:] if token not in row[:3])
    where = row.index(stop)
    stopped = generate(model, prompt, 20, temperature=0, stop=stop)
    assert torch.equal(stopped[0, : where + 1], free[0, : where + 1]) and bool(
        (stopped[0, where:] == stop).all()
    )
    alone = generate(model, prompt[:1], 20, temperature=0, stop=stop)
    assert alone.tolist() == [row[: where + 1]]


def test_every_column_is_reported_as_it_comes(prompt: Tensor) -> None:
    columns: list[Tensor] = []
    tokens = generate(build(), prompt, 6, on_token=columns.append)
    assert torch.equal(torch.stack(columns, 1), tokens)


def test_learned_positions_can_be_filled_to_the_last(prompt: Tensor) -> None:
    model = build(max_length=10)
    assert possible_tokens(model, 7) == 4
    assert generate(model, prompt, 4).shape == (3, 4)
    with pytest.raises(
        ValueError,
        match="5 new tokens were asked for and 4 are possible.*10 learned positions.*at most 4",
    ):
        generate(model, prompt, 5)
    with pytest.raises(ValueError, match="shorten the prompt"):
        generate(model, torch.zeros(1, 11, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="the text has 11 tokens and the model 10 learned"):
        model(torch.zeros(1, 11, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, r"max_tokens \(--max-tokens\) is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"topk": 0}, "topk is 0"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; it must be a whole number"),
        ({"prompt": [[1, 2]]}, "the prompt is list; expected int64"),
        ({"real": torch.ones(3, 2, dtype=torch.long)}, r"pass attention_mask.bool\(\)"),
        ({"real": torch.ones(3, 9, dtype=torch.bool)}, "real is torch.bool .*; expected bool"),
        ({"topp": 0.0}, "topp is 0"),
        ({"topp": 1.5}, "topp is 1.5"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"prompt": torch.full((1, 2), VOCABULARY)}, "outside the model's vocabulary"),
    ],
)
def test_bad_requests_say_what_is_wrong(change: dict, message: str, prompt: Tensor) -> None:
    request = {"prompt": prompt, "max_tokens": 3, **change}
    with pytest.raises(ValueError, match=message):
        generate(build(), **request)


def test_padding_after_a_prompt_is_refused(prompt: Tensor) -> None:
    """As most tokenizers pad: the padding would be continued."""
    real = torch.ones_like(prompt, dtype=torch.bool)
    for column in (-1, 1):
        right = real.clone()
        right[0, column] = False
        with pytest.raises(ValueError, match="pad on the left"):
            generate(build(), prompt, 3, real=right)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite_are_named(
    number: float, temperature: float, prompt: Tensor
) -> None:
    """The best of them was a token without a word, and draws failed in torch's."""
    model = build()
    with torch.no_grad():
        model.embedding.weight[3] = number
    with pytest.raises(ValueError, match=r"not finite, so its weights hold NaN"):
        generate(model, prompt, 4, temperature=temperature)


def test_training_mode_is_refused(prompt: Tensor) -> None:
    with pytest.raises(ValueError, match="eval"):
        generate(build().train(), prompt, 3)


def test_streamed_text_never_shows_half_a_character(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(
        train_tokenizer(["some plain words to learn from"] * 20, vocab_size=290)
    )
    tokenizer = Tokenizer(tmp_path)
    text = " some \u00e9 \u4e2d\U0001f600 words\n"
    growing = GrowingText(tokenizer)
    pieces = [growing.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert "" in pieces and max(map(len, pieces)) < 10
