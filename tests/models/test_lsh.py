"""LSH whose number of buckets is left open answers alike, however long the text and whatever stands
beside it.
"""

from typing import Any

import pytest
import torch

from memshard.models.config import MixerConfig, ModelConfig
from memshard.models.decode.generate import generate, left_padded
from memshard.models.mixers.kinds import bucket_count
from memshard.models.mixers.lsh import LSHMixer
from memshard.models.seq2seq import build_model
from memshard.models.transformer import Transformer
from tests.models.tiny import tiny_config, tiny_model, tiny_tokens


@pytest.fixture
def model() -> Transformer:
    """Texts of 5, 20 and 90 tokens would choose 1, 8 and 32 buckets."""
    mixer: dict[str, Any] = {"kind": "lsh", "chunk": 2}
    return tiny_model(tiny_config({"layers": ()}, mixer=mixer, position="rotary")).eval()


def test_logits_do_not_depend_on_how_long_a_text_goes_on(model: Transformer) -> None:
    tokens = tiny_tokens(1, 90)
    with torch.no_grad():
        whole = model(tokens)[0]
        for length in (5, 20):
            torch.testing.assert_close(model(tokens[:, :length])[0], whole[:, :length])


def test_generation_does_not_depend_on_how_much_is_asked_for(model: Transformer) -> None:
    prompt = tiny_tokens(1, 5)
    few = generate(model, prompt, 8, temperature=0)
    assert torch.equal(few, generate(model, prompt, 80, temperature=0)[:, :8])
    assert len(few.unique()) > 2


def test_prompts_beside_longer_ones_are_continued_as_if_alone(model: Transformer) -> None:
    rows = [tiny_tokens(length).tolist() for length in (3, 20, 70)]
    tokens, real = left_padded(rows, 1)
    together = generate(model, tokens, 8, real=real, temperature=0)
    for row, continued in zip(rows, together, strict=True):
        alone = generate(model, torch.tensor([row]), 8, temperature=0)[0]
        assert torch.equal(continued, alone)


def test_the_number_of_buckets_is_that_of_the_training_length() -> None:
    config = ModelConfig(vocab_size=9, mixer=MixerConfig(pattern=("softmax", "lsh"), chunk=4))
    resolved = config.for_length(100)
    assert (resolved.mixer.buckets, resolved.max_length) == (bucket_count(100, 4), 100)
    assert resolved.for_length(1000) == resolved
    mixer = build_model(resolved).blocks[1].mixer
    assert isinstance(mixer, LSHMixer) and mixer.buckets == 16
    assert ModelConfig().for_length(100).mixer.buckets == 0  # nothing hashes


def test_a_model_without_any_length_is_refused() -> None:
    config = ModelConfig(vocab_size=9, position="rotary", mixer=MixerConfig(kind="lsh"))
    with pytest.raises(ValueError, match=r"buckets is 0, and without model\.max_length"):
        build_model(config)
