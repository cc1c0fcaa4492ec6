"""Generate text from a model, token by token, with cached states."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memshard.models.context import Context
from memshard.models.memory.check_input import kind_of
from memshard.models.program.cached import refusal
from memshard.models.program.mixer import ProgramMixer
from memshard.models.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Tensor,
    max_tokens: int,
    *,
    real: Tensor | None = None,
    temperature: float = 1.0,
    topk: int | None = None,
    topp: float | None = None,
    stop: int | None = None,
    seed: int = 0,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue every row of `prompt`.

    prompt: [batch, length] int64. real: [batch, length] bool, False for padding, which comes before
    a row's tokens and changes nothing (see `left_padded`). Returns the new tokens, [batch, n]
    int64, where n is max_tokens, or less once every row has reached `stop`; rows that reach it
    earlier are filled with it. temperature: divides the logits; 0 takes the best token. topk: draw
    among that many best tokens. topp: draw among the fewest best tokens whose probabilities, after
    temperature and topk, reach topp (nucleus sampling, Holtzman et al. 2020). seed: equal seeds
    give equal draws on one device. on_token: called with each new column, [batch].
    ValueError as in `check_request` and `check_numbers`.
    """
    check_request(model, prompt, max_tokens, real, temperature=temperature, topk=topk, topp=topp)
    prompt = prompt.to(model.embedding.weight.device)
    batch, length = prompt.shape
    real = torch.ones_like(prompt, dtype=torch.bool) if real is None else real.to(prompt.device)
    # Padding comes first, so positions count from a row's first real token.
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    ctx = Context(positions=positions, padding=None if bool(real.all()) else real)
    random = torch.Generator(prompt.device).manual_seed(seed)
    # The last new token is never an input.
    states = model.init_states(batch, length + max_tokens - 1)
    ended = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    columns: list[Tensor] = []
    fed = prompt
    while len(columns) < max_tokens and not bool(ended.all()):
        logits, advanced = model(fed, ctx, states)
        check_numbers(logits)
        states = advanced
        ctx = Context(positions=ctx.positions[:, -1:] + 1)
        tokens = _draw(
            restrict(logits[:, -1].float(), temperature, topk, topp), temperature, random
        )
        if stop is not None:
            tokens = tokens.masked_fill(ended, stop)
            # Rows that ended before have just been filled with `stop`, so they stay ended.
            ended = tokens == stop
        columns.append(tokens)
        if on_token is not None:
            on_token(tokens)
        fed = tokens[:, None]
    return torch.stack(columns, dim=1)


def left_padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Return prompts of different lengths as one batch: tokens, [batch, longest] int64, with
    padding before each row's tokens, and which of them are real, [batch, longest] bool.
    """
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), filler)
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        real[number, longest - len(row) :] = True
    return tokens, real


def check_request(
    model: Transformer,
    prompt: Tensor,
    max_tokens: int,
    real: Tensor | None = None,
    *,
    temperature: float = 1.0,
    topk: int | None = None,
    topp: float | None = None,
) -> None:
    """Raise ValueError, with the fix, for arguments that `generate` cannot serve."""
    if model.training:
        raise ValueError(
            "the model is in training mode, where memories normalise queries over the batch: call "
            "model.eval() first"
        )
    for block in model.blocks:
        if isinstance(block.mixer, ProgramMixer) and (reason := refusal(block.mixer.program)):
            raise ValueError(f"model.program cannot generate with a cache: {reason}")
    if model.config.encoder_layers:
        raise ValueError(
            "the model has an encoder (model.encoder_layers): beam_search translates with it, and "
            "masked tokens go on nowhere"
        )
    if not isinstance(prompt, Tensor) or (
        prompt.ndim != 2 or 0 in prompt.shape or prompt.dtype != torch.int64
    ):
        raise ValueError(
            f"the prompt is {kind_of(prompt)}; expected int64 [batch, length] with at least one "
            "token a row"
        )
    if real is not None:
        if not isinstance(real, Tensor) or real.dtype != torch.bool or real.shape != prompt.shape:
            raise ValueError(
                f"real is {kind_of(real)}; expected bool {list(prompt.shape)}, as the prompt: of a "
                "mask of zeros and ones, pass attention_mask.bool()"
            )
        if not bool((real[:, -1:] & (real[:, 1:] >= real[:, :-1])).all()):
            raise ValueError(
                "padding follows tokens of the prompt, and new tokens would follow it: pad on the "
                "left (padding_side='left' of Hugging Face's tokenizers)"
            )
    vocabulary = model.embedding.num_embeddings
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocabulary:
        raise ValueError(
            f"the prompt has tokens outside the model's vocabulary of {vocabulary}: encode it "
            "with the model's tokenizer"
        )
    if not isinstance(max_tokens, int):
        raise ValueError(f"max_tokens is {max_tokens!r}; it must be a whole number")
    if max_tokens < 1:
        raise ValueError(f"max_tokens (--max-tokens) is {max_tokens}; it must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature is {temperature}; it must be at least 0 (0 takes the best token)"
        )
    if topk is not None and topk < 1:
        raise ValueError(f"topk is {topk}; it must be at least 1")
    if topp is not None and not 0 < topp <= 1:
        raise ValueError(f"topp is {topp}; it must be above 0 and at most 1")
    possible = possible_tokens(model, prompt.shape[1])
    if possible is not None and max_tokens > possible:
        advice = (
            f"set max_tokens (--max-tokens) to at most {possible}, or shorten the prompt"
            if possible
            else "shorten the prompt"
        )
        raise ValueError(
            f"{max_tokens} new tokens were asked for and {possible} are possible: the model has "
            f"{model.config.max_length} "
            f"{model.config.position} positions and the prompt {prompt.shape[1]} tokens; {advice}"
        )


def check_numbers(logits: Tensor) -> None:
    """Raise ValueError if a logit is no number, or infinite: the best of those would be a token as
    any other. logits: [batch, length, vocabulary].
    """
    # -inf is a token that cannot come; comparisons with NaN are False.
    if not bool((logits[:, -1] < torch.inf).all()):
        raise ValueError(
            "the model answers with numbers that are not finite, so its weights hold NaN or are "
            "too large for the precision: take an earlier checkpoint, or fp32"
        )


def possible_tokens(model: Transformer, prompt_length: int) -> int | None:
    """Return how many tokens the model's learned or axial positions allow after a prompt; None for
    positions without an end.
    """
    if model.config.position not in ("learned", "axial"):
        return None
    assert model.config.max_length is not None
    if prompt_length > model.config.max_length:
        return 0
    # One more than positions are left: the last new token is never an input.
    return model.config.max_length - prompt_length + 1


def restrict(logits: Tensor, temperature: float, topk: int | None, topp: float | None) -> Tensor:
    """Return logits divided by temperature (unless that is 0), with -inf for tokens that topk and
    topp exclude. logits: [batch, vocabulary].
    """
    if temperature:
        # Shift the largest logit to 0 first: a tiny temperature then overflows to -inf at worst,
        # never to inf.
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if topk is not None and topk < logits.shape[-1]:
        best = logits.topk(topk, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
    if topp is not None and topp < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        # Always keep the first token, even if rounding lifts `before` to topp.
        excluded = before >= topp
        excluded[:, 0] = False
        logits = logits.masked_fill(
            torch.zeros_like(excluded).scatter(-1, order, excluded), -torch.inf
        )
    return logits


def _draw(logits: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]
