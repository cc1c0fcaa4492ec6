"""Reversible blocks equal their naive twin bit for bit: outputs, gradients of inputs and
parameters, reads kept for tables.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memshard.models.config import MixerConfig
from memshard.models.context import Context
from memshard.models.loss import token_losses
from memshard.models.memory.table import externalize_tables, find_tables
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.recompute.naive import naive_block, naive_reversible
from memshard.models.recompute.reversible import feedforward_change, mixer_change, reversible_blocks
from memshard.models.transformer import Transformer
from tests.models.passes import LENGTH, assert_same, tiny_context, two_passes
from tests.models.tiny import MIXERS, VOCABULARY, tiny_config, tiny_model, tiny_tokens

_VARIANTS: list[dict[str, Any]] = [
    {"memory": {"layers": ()}, "activation": "relu"},
    {"memory": {"layers": ()}, "activation": "swiglu", "norm": "rms", "tie_head": False},
    {"memory": {"share": True}, "activation": "squared_relu"},
    {"memory": {"gate": True, "value_dim": 5, "mode": "add", "query_norm": "lagged"}},
    {"memory": {"kind": "peer", "query_norm": "layer"}, "tie_head": False},
    {"memory": {"kind": "peer", "share": True, "mode": "add"}},
    {"memory": {"query_norm": "none", "layers": (0, 1, 2)}},
    {
        "memory": {"mode": "add"},
        "activation": "squared_relu",
        "norm": "primer",
        "norm_after": True,
        "mixer": MixerConfig(heads=2, convolution=3, share_qk=True),
    },
]


def _model(hidden: bool = False, mixer: MixerConfig | None = None, **changes: Any) -> Transformer:
    config = tiny_config(residual="reversible", **changes)
    model = tiny_model(replace(config, mixer=mixer or config.mixer), spread=0.1).float().train()
    if hidden:
        externalize_tables(model)
    return model


def _ours(model: Transformer, tokens: Tensor, ctx: Context) -> Tensor:
    return model(tokens, ctx)[0]


@pytest.mark.parametrize("changes", _VARIANTS, ids=str)
def test_every_block_is_its_naive_twin(changes: dict[str, Any]) -> None:
    _compare(_model(hidden=True, **changes), torch.float32)


@pytest.mark.parametrize("which", ["plain", "documents", "padding"])
@pytest.mark.parametrize(
    "mixer",
    [
        MixerConfig(heads=2, kind="local", window=3),
        MixerConfig(heads=2, kind="lsh", chunk=2, rounds=3, heads_at_once=1, convolution=2),
        MixerConfig(heads=2, kind="linear", features="favor", feature_width=4),
        MixerConfig(heads=2, kind="delta", features="dpfp", convolution=3),
    ],
    ids=lambda mixer: mixer.kind,
)
def test_every_mixer(mixer: MixerConfig, which: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _compare(_model(hidden=True, mixer=mixer), dtype, which)


@pytest.mark.parametrize("changes", _VARIANTS[3:6:2], ids=str)
def test_tables_that_are_parameters(changes: dict[str, Any]) -> None:
    _compare(_model(**changes), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    _compare(_model(hidden=True, **_VARIANTS[3]), dtype)


def _compare(model: Transformer, dtype: torch.dtype, which: str = "plain") -> None:
    model.configure(Recompute(check_inversion=True))
    twin = deepcopy(model)
    ours = two_passes(model, _ours, tiny_context(which), dtype)
    assert_same(ours, two_passes(twin, naive_reversible, tiny_context(which), dtype))
    assert all(ours[f"gradient of {name}"].any() for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_a_state_from_before(kind: Any) -> None:
    """Nothing of the state has a gradient."""
    model = _model(hidden=True, mixer=MixerConfig(heads=2, kind=kind))
    with torch.no_grad():
        states = model(
            tiny_tokens(3, LENGTH, seed=9), tiny_context(), model.init_states(3, LENGTH)
        )[1]
    model.configure(Recompute(check_inversion=True))
    twin = deepcopy(model)
    ours = two_passes(model, lambda *call: model(*call[1:], states)[0], tiny_context("documents"))
    assert_same(
        ours, two_passes(twin, partial(naive_reversible, states=states), tiny_context("documents"))
    )


@pytest.mark.parametrize("which", ["documents", "padding"])
def test_masks_and_dropout(which: str) -> None:
    model = _model(True, memory={"mode": "add"})
    model.configure(Recompute(check_inversion=True))
    for block in model.blocks:
        block.dropout_rate = 0.3
    twin = deepcopy(model)
    assert_same(
        two_passes(model, _ours, tiny_context(which), torch.float32),
        two_passes(twin, naive_reversible, tiny_context(which), torch.float32),
    )


def test_shared_and_frozen_parameters() -> None:
    model = _model(memory={"layers": (1,)})
    model.blocks[2].mixer = model.blocks[0].mixer
    assert model.blocks[0].feedforward is not None
    model.blocks[2].feedforward = model.blocks[0].feedforward
    for parameter in (
        model.embedding.weight,
        model.positions.weight,
        *model.blocks[1].mixer.parameters(),
    ):  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    twin = deepcopy(model)
    ours = two_passes(model, _ours, tiny_context(), torch.float32)
    assert_same(ours, two_passes(twin, naive_reversible, tiny_context(), torch.float32))
    assert (
        "gradient of blocks.0.mixer.query.weight" in ours
        and "gradient of blocks.1.mixer.query.weight" not in ours
    )


def test_a_weight_that_autocast_casts_in_a_block_and_again_outside_gets_both_gradients() -> None:
    """Autocast's cache of half precision copies would hand the copy of the
    gradient-free pass on.
    """

    def twice(logits: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(model: Transformer, tokens: Tensor, ctx: Context) -> Tensor:
            inside = logits(model, tokens, ctx)
            return inside + model.blocks[0].mixer.query(model.embedding(tokens)).sum()

        return function

    model = _model(memory={"layers": ()})
    twin = deepcopy(model)
    ours = two_passes(model, twice(_ours), tiny_context(), torch.bfloat16)
    theirs = two_passes(twin, twice(naive_reversible), tiny_context(), torch.bfloat16)
    # The twin adds both gradients up in bf16.
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mixer", ["softmax", "lsh", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_48_layers_with_memory_and_dropout_invert_bit_for_bit(
    dtype: torch.dtype, mixer: str
) -> None:
    """Blocks run forward by hand, then back by hand; and gradients are as from checkpointing the
    same function.
    """
    model = _model(
        True,
        layers=48,
        memory={"layers": tuple(range(3, 48, 12))},
        dropout=0.2,
        mixer=MixerConfig(heads=2, **MIXERS[mixer]),
    )
    for block in model.blocks:
        # Large branches: the streams reach about 40.
        torch.nn.init.normal_(block.mixer.output.weight, std=0.4)
    ctx, tokens = tiny_context(), tiny_tokens(3, LENGTH)
    assert model.grid is not None
    start = model.embedding(tokens).detach()
    start[0, :2] = -1e-6  # rounds to -0
    with torch.no_grad(), torch.autocast("cpu", dtype):
        x1, x2, _ = reversible_blocks(model.blocks, model.grid, start, ctx)
        assert 5 < x1.abs().max() < 500
        for block in reversed(model.blocks):
            x2 = x2 - feedforward_change(block, model.grid, x1, ctx)
            x1 = x1 - mixer_change(block, model.grid, x2, ctx)[0]
    assert torch.equal(
        x1.view(torch.int32), (model.grid.round(start) + 0.0).view(torch.int32)
    ) and torch.equal(x2, x1)

    checkpointed = partial(checkpoint, naive_block, use_reentrant=False)
    gradients = []
    for checked in (False, True):
        copy = deepcopy(model)
        x = start.detach().requires_grad_()
        assert copy.grid is not None
        with torch.autocast("cpu", dtype):
            if checked:
                y1, y2 = copy.grid.round(x).clone(), copy.grid.round(x).clone()
                for block in copy.blocks:
                    y1, y2 = (checkpointed if block.memory is None else naive_block)(
                        block, y1, y2, ctx
                    )
            else:
                y1, y2, _ = reversible_blocks(copy.blocks, copy.grid, x, ctx, check=True)
        (y1 * y2).mean().backward()
        assert x.grad is not None
        gradients.append(
            [
                x.grad,
                *(p.grad for p in copy.blocks.parameters()),
                *(t.reads[0].upstream for _, t in find_tables(copy)),
            ]
        )
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_evaluation_and_cached_decoding() -> None:
    model = _model(memory={"query_norm": "lagged"}).double().eval()
    tokens = tiny_tokens(3, LENGTH)
    with torch.no_grad():
        full = model(tokens)[0]
        assert torch.equal(full, naive_reversible(model, tokens, Context.of(tokens)))
        states, parts = model.init_states(3, LENGTH), []
        for part in tokens.split([5, 1, 3], dim=1):
            logits, states = model(part, None, states)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-9, atol=1e-9)
    # With gradients but without training, too.
    torch.testing.assert_close(model(tokens)[0], full, rtol=0, atol=0)


def test_a_branch_that_is_not_deterministic_is_found() -> None:
    model = _model(memory={"layers": ()})
    model.configure(Recompute(check_inversion=True))
    layer = model.blocks[1].feedforward
    assert layer is not None
    layer.register_forward_hook(lambda *args: args[-1] + torch.rand(()))
    loss = model(tiny_tokens(3, LENGTH), tiny_context())[0].sum()
    with pytest.raises(RuntimeError, match="the input of block 1 was not rebuilt exactly"):
        loss.backward()


def test_a_graph_may_be_kept_but_not_differentiated_twice() -> None:
    model = _model(True, memory={"mode": "add", "gate": True})
    weights = [p for p in model.parameters() if p.requires_grad]
    loss = token_losses(
        model(tiny_tokens(3, LENGTH), tiny_context())[0], tiny_tokens(3, LENGTH, seed=1)
    ).sum()
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    again = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    loss = model(tiny_tokens(3, LENGTH), tiny_context())[0].sum()
    with pytest.raises(RuntimeError, match="have no second derivative"):
        sum(
            gradient.sum() for gradient in torch.autograd.grad(loss, weights, create_graph=True)
        ).backward()  # type: ignore[union-attr]


def test_hooks_that_would_run_twice_are_refused() -> None:
    model = _model(memory={"layers": ()})
    model.blocks[0].mixer.query.weight.register_hook(lambda gradient: gradient / 2)
    with pytest.raises(ValueError, match="use register_post_accumulate_grad_hook"):
        model(tiny_tokens(3, LENGTH))
    assert model.config.vocab_size == VOCABULARY
