"""Beam search against twins without batches, states or tricks."""

import itertools
import math

import pytest
import torch

from memshard.models.context import Context
from memshard.models.decode.beam import Hypothesis, beam_search, padded
from memshard.models.seq2seq import EncoderDecoder
from tests.models.test_seq2seq import translator

EOS = 1
SOURCES = [[3, 2, 4, 1], [2, 1], [4, 4, 0, 3, 2, 1]]


def _model(attention: str) -> EncoderDecoder:
    """Return a model over five tokens, of a draw in which hypotheses of several
    lengths are good.
    """
    return translator(attention, vocab_size=5)


def _log_probabilities(
    model: EncoderDecoder, source: list[int], targets: list[list[int]]
) -> torch.Tensor:
    """Return log-probabilities of each next token after every prefix of one length, uncached."""
    whole = torch.tensor([source]).expand(len(targets), -1)
    return model(
        torch.tensor([[EOS, *tokens] for tokens in targets]), source=(whole, Context.of(whole))
    )[0].log_softmax(-1)


def _exhaustive(model: EncoderDecoder, source: list[int], longest: int, alpha: float) -> Hypothesis:
    best = Hypothesis([], -math.inf)
    for length in range(longest):
        targets = [list(tokens) for tokens in itertools.product([0, 2, 3, 4], repeat=length)]
        words = torch.tensor([[*tokens, EOS] for tokens in targets])
        totals = _log_probabilities(model, source, targets).gather(-1, words[..., None]).sum((1, 2))
        score = float(totals.max()) / (length + 1) ** alpha
        best = max(
            best,
            Hypothesis(targets[int(totals.argmax())], score),
            key=lambda hypothesis: hypothesis.score,
        )
    return best


def _step_by_step(
    model: EncoderDecoder, source: list[int], longest: int, beam: int, alpha: float
) -> Hypothesis:
    living: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[Hypothesis] = []
    for length in range(1, longest + 1):
        candidates = []
        for total, tokens in living:
            shares = _log_probabilities(model, source, [tokens])[0, -1]
            candidates += [
                (total + float(share), [*tokens, token]) for token, share in enumerate(shares)
            ]
        candidates.sort(key=lambda candidate: -candidate[0])
        penalty = length**alpha
        finished += [
            Hypothesis(tokens[:-1], total / penalty)
            for total, tokens in candidates[:beam]
            if tokens[-1] == EOS
        ]
        living = [candidate for candidate in candidates if candidate[1][-1] != EOS][:beam]
        if len(finished) >= beam:
            break
    best = [Hypothesis(tokens, total / penalty) for total, tokens in living[:1]]
    return max(finished or best, key=lambda hypothesis: hypothesis.score)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("attention", ["softmax", "delta"])
@torch.no_grad()
def test_a_beam_without_end_finds_the_best_of_all_targets(attention: str, alpha: float) -> None:
    model = _model(attention)
    hypotheses = beam_search(
        model, *padded(SOURCES, EOS), max_tokens=4, eos=EOS, beam=1000, length_penalty=alpha
    )
    for source, hypothesis in zip(SOURCES, hypotheses, strict=True):
        expected = _exhaustive(model, source, 4, alpha)
        assert hypothesis.tokens == expected.tokens and math.isclose(
            hypothesis.score, expected.score, rel_tol=1e-6
        )


@pytest.mark.parametrize("beam", [1, 2, 3])
@pytest.mark.parametrize("attention", ["softmax", "linear", "dpfp", "delta"])
@torch.no_grad()
def test_batched_cached_beams_equal_single_uncached_ones(attention: str, beam: int) -> None:
    model = _model(attention)
    for longest in (3, 8):
        hypotheses = beam_search(
            model, *padded(SOURCES, EOS), max_tokens=longest, eos=EOS, beam=beam, length_penalty=0.6
        )
        for source, hypothesis in zip(SOURCES, hypotheses, strict=True):
            expected = _step_by_step(model, source, longest, beam, 0.6)
            assert hypothesis.tokens == expected.tokens and math.isclose(
                hypothesis.score, expected.score, rel_tol=1e-6
            )


def test_a_model_that_answers_with_nan_is_refused() -> None:
    """The best hypothesis of NaN was one as any other, without a word."""
    model = _model("softmax")
    with torch.no_grad():
        model.embedding.weight[3] = torch.nan
    with pytest.raises(ValueError, match="not finite, so its weights hold NaN"):
        beam_search(model, *padded(SOURCES, EOS), max_tokens=5, eos=EOS)
