"""Wherever n-gram memories stand in a model: what they see, how they decode, what they learn."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.models.context import Context
from memshard.models.initialize import initialize
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.models.ngram.kinds import RULES, NgramConfig
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.transformer import Transformer
from tests.models.tiny import MIXERS, tiny_config, tiny_model, tiny_tokens

LENGTH, CHANGED = 12, 7
PLACES: dict[str, dict[str, Any]] = {
    "embedding": {"place": "embedding", "layers": (0,), "gate": "none"},
    "mixer": {"place": "mixer", "layers": (0, 2), "gate": "context", "convolution": 3},
    "mixer, shared": {"place": "mixer", "layers": (0, 1, 2), "gate": "scalar", "share": True},
    "feedforward": {"place": "feedforward", "layers": (1,), "gate": "glu"},
    "values": {"place": "values", "layers": (0, 2), "gate": "heads"},
    "replace": {"place": "replace", "layers": (0,), "gate": "glu"},
}
_CHUNKS = ((0, 5), (5, 6), (6, 7), (7, 11), (11, 12))


def ngram(rule: str, place: str, **changes: Any) -> NgramConfig:
    """Return settings that are small enough to collide within ten tokens."""
    heads = {} if RULES[rule].most_heads else {"heads": 2}
    settings = {"rows": 11, "value_dim": 4, "eos": 22} | heads | PLACES[place] | changes
    return NgramConfig(rule=rule, **settings)


def model_with(settings: NgramConfig, seed: int = 0, **changes: Any) -> Transformer:
    """Return a model in fp64 that has product keys in layer 1 as well."""
    memory = {"layers": (1,), "query_norm": "layer"}
    if settings.place == "replace":
        memory["layers"] = (2,)
    config = replace(tiny_config(memory, **changes), ngram=settings)
    return tiny_model(config, seed)


def context(which: str, batch: int = 3) -> Context:
    positions = torch.arange(LENGTH).repeat(batch, 1)
    if which == "documents":
        documents = [[0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3], [5] * 7 + [4] * 5, [0] * 12]
        return Context(positions, documents=torch.tensor(documents)[:batch])
    if which == "left padding":
        lefts = torch.tensor([4, 0, 11])[:batch, None]
        return Context((positions - lefts).clamp(min=0), padding=positions >= lefts)
    return Context(positions)


def part(ctx: Context, start: int, end: int) -> Context:
    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, start:end]

    return Context(
        ctx.positions[:, start:end], documents=cut(ctx.documents), padding=cut(ctx.padding)
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", PLACES)
def test_chunked_prefill_and_decode_equal_the_full_forward(rule: str, place: str) -> None:
    model, tokens = model_with(ngram(rule, place)).eval(), tiny_tokens(3, LENGTH)
    for which in ("plain", "documents", "left padding"):
        ctx = context(which)
        with torch.no_grad():
            full = model(tokens, ctx)[0]
            states, parts = model.init_states(3, LENGTH), []
            for start, end in _CHUNKS:
                logits, states = model(tokens[:, start:end], part(ctx, start, end), states)
                parts.append(logits)
        real = slice(None) if ctx.padding is None else ctx.padding
        torch.testing.assert_close(torch.cat(parts, 1)[real], full[real], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
def test_states_are_reordered_taken_back_and_reset(place: str) -> None:
    model, tokens = model_with(ngram("engram", place)).eval(), tiny_tokens(3, LENGTH)
    with torch.no_grad():
        _, states = model(tokens[:, :8], None, model.init_states(3, LENGTH))
        full = model(tokens)[0]
        rows = torch.tensor([2, 0])
        other = model(tokens[rows, 8:], None, model.reorder(deepcopy(states), rows))[0]
        torch.testing.assert_close(other, full[rows, 8:], rtol=1e-12, atol=1e-12)
        _, further = model(tokens[:, 8:11], None, deepcopy(states))
        again = model(tokens[:, 8:], None, model.rollback(further, 3))[0]
        torch.testing.assert_close(again, full[:, 8:], rtol=1e-12, atol=1e-12)


def test_a_state_that_is_reset_has_no_tokens() -> None:
    model = model_with(ngram("engram", "mixer"), mixer=MIXERS["delta"], position="none").eval()
    tokens = tiny_tokens(2, LENGTH)
    with torch.no_grad():
        _, states = model(tokens[:, :8], None, model.init_states(2, 0))
        states = model.reset(states, torch.tensor([True, False]))
        begun, going = model(tokens[:, 8:], None, states)[0]
        torch.testing.assert_close(begun, model(tokens[:1, 8:])[0][0])
        torch.testing.assert_close(going, model(tokens)[0][1, 8:])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("place", ["mixer", "feedforward", "values"])
def test_no_token_sees_a_later_one(mixer: str, place: str) -> None:
    if place == "values" and MIXERS[mixer].get("heads_at_once"):
        with pytest.raises(ValueError, match="heads_at_once"):
            model_with(ngram("engram", place), mixer=MIXERS[mixer])
        return
    model = model_with(ngram("engram", place), mixer=MIXERS[mixer]).train()
    tokens, other = tiny_tokens(2, LENGTH), tiny_tokens(2, LENGTH, seed=5)
    other[:, :CHANGED] = tokens[:, :CHANGED]
    first, second = (deepcopy(model)(x)[0] for x in (tokens, other))
    near = 1e-12 if "lsh" in mixer or mixer == "mixed" else 0
    assert (first - second)[:, :CHANGED].abs().max() <= near
    assert not torch.equal(first[:, CHANGED:], second[:, CHANGED:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", PLACES)
def test_documents_do_not_see_each_other(rule: str, place: str) -> None:
    model = model_with(ngram(rule, place)).train()
    tokens, ctx = tiny_tokens(1, LENGTH), context("documents", 1)
    assert ctx.documents is not None
    middle = ctx.documents == 1
    other = torch.where(middle, tokens, (tokens + 1) % 23)
    first, second = (deepcopy(model)(x, ctx)[0] for x in (tokens, other))
    assert torch.equal(first[middle], second[middle])


def test_an_end_of_document_is_a_border_without_document_ids() -> None:
    tokens = tiny_tokens(1, LENGTH) % 22
    tokens[0, 5] = 22
    other = tokens.clone()
    other[0, 4] = (tokens[0, 4] + 1) % 22

    def windows(**changes: Any) -> list[Tensor]:
        model = model_with(ngram("engram", "mixer", **changes))
        assert model.window is not None
        return [model.window(x, Context.of(x))[0] for x in (tokens, other)]

    first, second = windows(eos=22)
    assert torch.equal(first[:, 6:], second[:, 6:])
    first, second = windows(eos=22, reset=False)
    assert not torch.equal(first[:, 6:], second[:, 6:])


def _learn(model: Transformer, tokens: Tensor, recompute: Recompute) -> dict[str, Tensor]:
    """Return the gradients of everything, those of the tables dense."""
    model.configure(recompute)
    tables = externalize_tables(model)
    model.train()
    model(tokens[:, :-1], targets=tokens[:, 1:])[0].sum().backward()
    return _gradients(model, tables)


def _gradients(model: Transformer, tables: list[ValueTable]) -> dict[str, Tensor]:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for number, table in enumerate(tables):
        gradients[f"table {number}"] = dense = torch.zeros_like(table.weight)
        for sorted_reads in table.gradients(1):
            dense[sorted_reads.rows] = sorted_reads.sums(0, len(sorted_reads.rows))
    return gradients


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "recompute",
    [
        Recompute("full"),
        Recompute("selective"),
        Recompute("full", chunk=4),
        Recompute(chunk=5),
        Recompute(segments=3),
    ],
    ids=str,
)
def test_recomputation_changes_no_gradient(place: str, recompute: Recompute) -> None:
    changes: dict[str, Any] = {"position": "rotary"}
    model, tokens = model_with(ngram("engram", place), **changes), tiny_tokens(2, LENGTH + 1)
    expected = _learn(deepcopy(model), tokens, Recompute())
    actual = _learn(model, tokens, recompute)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert all(gradient.any() for name, gradient in expected.items() if "table" in name)


@pytest.mark.parametrize("place", PLACES)
def test_reversible_streams_keep_nothing_and_lose_nothing(place: str) -> None:
    """Against the same function without reversing: autograd through the block's own branches."""
    model = model_with(ngram("engram", place), residual="reversible")
    tokens = tiny_tokens(2, LENGTH + 1)
    expected = _plain_reversible(deepcopy(model), tokens)
    actual = _learn(model, tokens, Recompute(check_inversion=True))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def _plain_reversible(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    tables = externalize_tables(model)
    model.train()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    assert model.window is not None and model.grid is not None
    ctx = Context.of(inputs)
    ctx = replace(ctx, window=model.window(inputs, ctx)[0])
    x1 = x2 = model.grid.round(model._embed(inputs, ctx))
    for block in model.blocks:
        x1 = x1 + model.grid.round(block.mixer_branch(x2, ctx)[0])
        x2 = x2 + model.grid.round(block.feedforward_branch(x1, ctx))
    model._losses(x1, x2, targets).sum().backward()
    return _gradients(model, tables)


def test_a_convolution_begins_without_effect() -> None:
    """Also where a run draws the weights of a model that was built without memory."""
    model = model_with(ngram("engram", "mixer"))
    initialize(model, 0)
    for _, memory in model.ngrams():
        assert memory.convolutions.kernels() and not memory.convolutions.kernels()[0].any()
