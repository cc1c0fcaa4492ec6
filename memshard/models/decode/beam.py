"""Beam search with cached states: the best target of every source."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memshard.models.context import Context
from memshard.models.decode.generate import check_numbers
from memshard.models.seq2seq import EncoderDecoder


@dataclass(frozen=True)
class Hypothesis:
    """A target. tokens: without `eos`; score: log-probability in nats over the length penalty."""

    tokens: list[int]
    score: float


@torch.no_grad()
def beam_search(
    model: EncoderDecoder,
    source: Tensor,
    real: Tensor,
    max_tokens: int,
    eos: int,
    beam: int = 4,
    length_penalty: float = 1.0,
) -> list[Hypothesis]:
    """Return the best target for each row of `source`.

    source: [batch, length] int64; real: [batch, length] bool, False for padding after a row's
    tokens. Targets are decoded after `eos` and end with it, within max_tokens. In every step the
    `beam` best continuations of a row that do not end stay alive, and those among the best `beam`
    that end are finished; a row is done after `beam` finished ones. A row without any gets its best
    living hypothesis. length_penalty: alpha of the divisor tokens^alpha; 1 is the mean per token.
    (The gentler ((5 + tokens) / 6)^0.6 lets weak models prefer empty targets.) ValueError for
    requests that do not fit the model.
    """
    _check(model, source, max_tokens, beam)
    device = model.embedding.weight.device
    source, real = source.to(device), real.to(device)
    rows = len(source)
    ctx = Context(
        torch.arange(source.shape[1], device=device).expand(rows, -1),
        padding=None if bool(real.all()) else real,
    )
    states = model.init_states(rows, max_tokens)
    best: list[Hypothesis | None] = [None] * rows
    finished = [0] * rows
    # Living hypotheses of the rows that are not done: tokens [rows, hypotheses, length] and
    # log-probabilities [rows, hypotheses].
    numbers = list(range(rows))
    # One hypothesis a row at first: `beam` equal ones would all be continued in the same way.
    tokens = torch.full((rows, 1, 1), eos, device=device)
    scores = torch.zeros(rows, 1, device=device)
    for length in range(1, max_tokens + 1):
        place = Context(torch.full((tokens[..., 0].numel(), 1), length - 1, device=device))
        logits, advanced = model(
            tokens[..., -1].flatten()[:, None],
            place,
            states,
            source=(source, ctx) if length == 1 else None,
        )
        assert advanced is not None
        check_numbers(logits)
        vocabulary = logits.shape[-1]
        candidates = scores[..., None] + logits[:, -1].float().log_softmax(-1).unflatten(
            0, scores.shape
        )
        hypotheses = scores.shape[1]
        best_scores = candidates.flatten(1).topk(min(2 * beam, hypotheses * vocabulary))
        parents, words = best_scores.indices // vocabulary, best_scores.indices % vocabulary
        ends = words == eos
        penalty = length**length_penalty
        for row, place_in_row in ends[:, :beam].nonzero().tolist():
            score = float(best_scores.values[row, place_in_row]) / penalty
            finished[numbers[row]] += 1
            _keep(best, numbers[row], tokens[row, parents[row, place_in_row]], score)
        # At most one continuation of a hypothesis ends, so at least `beam` of the best
        # 2 beam go on.
        going = (
            ends.int()
            .sort(dim=-1, stable=True)
            .indices[:, : min(beam, hypotheses * (vocabulary - 1))]
        )
        alive = torch.tensor(
            [row for row, number in enumerate(numbers) if finished[number] < beam],
            device=device,
            dtype=torch.int64,
        )
        numbers = [numbers[row] for row in alive.tolist()]
        if not numbers:
            break
        parents, words, scores = (
            x[alive].gather(1, going[alive]) for x in (parents, words, best_scores.values)
        )
        tokens = torch.cat((tokens[alive[:, None], parents], words[..., None]), -1)
        # Rows that are done leave the batch, and each hypothesis takes its parent's states.
        states = model.reorder(advanced, (alive[:, None] * hypotheses + parents).flatten())
    for row, number in enumerate(numbers):
        if best[number] is None:
            _keep(best, number, tokens[row, 0], float(scores[row, 0]) / penalty)
    return [hypothesis for hypothesis in best if hypothesis is not None]


def padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Return sources of different lengths as one batch: tokens, [batch, longest] int64, and which
    of them are real, [batch, longest] bool.
    """
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
    return tokens, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]


def _keep(best: list[Hypothesis | None], number: int, tokens: Tensor, score: float) -> None:
    rival = best[number]
    if rival is None or score > rival.score:
        best[number] = Hypothesis(tokens[1:].tolist(), score)


def _check(model: EncoderDecoder, source: Tensor, max_tokens: int, beam: int) -> None:
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    if beam < 1 or max_tokens < 1:
        raise ValueError(f"beam is {beam} and max_tokens {max_tokens}; both must be at least 1")
    longest = model.config.max_length if model.config.position in ("learned", "axial") else None
    if longest is not None and max(source.shape[1], max_tokens) > longest:
        raise ValueError(
            f"the source has {source.shape[1]} tokens and the target at most {max_tokens}, but "
            f"the model has {longest} "
            f"{model.config.position} positions: shorten the source or lower max_tokens"
        )
