"""What backward computes again, and what that saves."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.kernels import cpu_banded
from memshard.models.loss import token_losses
from memshard.models.memory.table import externalize_tables, find_tables
from memshard.models.random import RandomKey
from memshard.models.recompute.checkpointing import Checkpointing, Recompute
from memshard.models.transformer import Transformer
from tests.live_bytes import LiveBytes
from tests.models.passes import LENGTH, assert_same, tiny_context, two_passes
from tests.models.tiny import MIXERS, tiny_config, tiny_model, tiny_tokens

_VARIANTS: list[dict[str, Any]] = [
    {"memory": {"layers": ()}, "activation": "swiglu", "norm": "rms"},
    {"memory": {"share": True}, "residual": "post", "dropout": 0.3},
    {"memory": {"gate": True, "value_dim": 5, "mode": "add", "query_norm": "lagged"}},
    {"memory": {"kind": "peer", "mode": "add"}},
]


def _logits(model: Transformer, tokens: Tensor, ctx: Context) -> Tensor:
    return model(tokens, ctx)[0]


@pytest.mark.parametrize("which", ["plain", "documents", "padding"])
@pytest.mark.parametrize("hidden", [False, True], ids=["visible", "hidden"])
@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("changes", _VARIANTS, ids=str)
def test_nothing_changes(
    changes: dict[str, Any], kind: Checkpointing, hidden: bool, which: str
) -> None:
    """Not a bit changes: running statistics take each batch in once, tables collect
    each read once.
    """
    model = tiny_model(tiny_config(**changes), spread=0.1).float().train()
    if hidden:
        externalize_tables(model)
    dtype = torch.bfloat16 if which == "padding" else torch.float32
    plain = two_passes(deepcopy(model), _logits, tiny_context(which), dtype)
    model.configure(Recompute(kind))
    assert_same(two_passes(model, _logits, tiny_context(which), dtype), plain)


def _bytes(
    residual: Any = "pre",
    kind: Checkpointing = "none",
    layers: int = 12,
    memory: tuple[int, ...] = (),
) -> tuple[int, int]:
    """Return the bytes that a forward pass of 256 tokens keeps, and the peak of both passes;
    parameters and their gradients aside.
    """
    config = ModelConfig(
        vocab_size=50,
        max_length=64,
        layers=layers,
        dim=32,
        mixer=MixerConfig(heads=2),
        residual=residual,
        dropout=0.1,
        memory=MemoryConfig(layers=memory, keys=16, heads=2, topk=4, key_dim=16),
    )
    model = Transformer(config).train()
    model.configure(Recompute(kind))
    externalize_tables(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.arange(256).view(4, 64) % 50
    ctx = Context(torch.arange(64).expand(4, -1), random=RandomKey(0, 0, torch.arange(4)))
    with LiveBytes() as live:
        loss = token_losses(model(tokens, ctx)[0], tokens).sum()
        kept = live.now
        loss.backward()
    return kept, live.peak


@pytest.mark.parametrize("memory", [(), (1,)], ids=["dense", "memory"])
def test_reversible_layers_cost_no_activations(memory: tuple[int, ...]) -> None:
    shallow = _bytes("reversible", layers=2, memory=memory)
    for layers in (12, 48):
        for value, reference in zip(
            _bytes("reversible", layers=layers, memory=memory), shallow, strict=True
        ):
            assert value < 1.15 * reference
    assert _bytes(layers=12, memory=memory)[1] > 3 * shallow[1]


@pytest.mark.parametrize("which", ["plain", "documents", "padding"])
@pytest.mark.parametrize(
    "changes",
    [{"memory": {"query_norm": "layer"}}, {"memory": {"layers": ()}, "dropout": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("mixer", ["linear", "convolved delta", "normalised delta"])
def test_segments_are_one_pass(mixer: str, changes: dict[str, Any], which: str) -> None:
    """Gradients flow back through the states; tables collect each read once."""
    model = tiny_model(tiny_config(mixer=MIXERS[mixer], **changes), spread=0.1).train()
    externalize_tables(model)
    by_segments = {}
    for segments in (1, 2, 4):
        copy = deepcopy(model)
        copy.configure(Recompute(segments=segments))
        tokens, ctx = tiny_tokens(3, LENGTH), tiny_context(which)
        losses, _ = copy(tokens, ctx, targets=tokens.roll(-1, dims=1))
        losses.sum().backward()
        gradients = {name: p.grad for name, p in copy.named_parameters() if p.grad is not None}
        reads = sum(len(read.upstream) for _, table in find_tables(copy) for read in table.reads)
        by_segments[segments] = {
            "losses": losses.detach(),
            "reads": torch.tensor(reads),
        } | gradients
    for segments in (2, 4):
        torch.testing.assert_close(by_segments[segments], by_segments[1], rtol=1e-10, atol=1e-12)


def test_what_segments_save() -> None:
    """A forward pass of 1,024 tokens in 16 segments keeps the losses and some states, and
    backward holds one segment.
    """

    def measure(segments: int) -> tuple[int, int]:
        mixer = MixerConfig(heads=4, kind="delta")
        model = Transformer(
            ModelConfig(vocab_size=50, layers=4, dim=64, mixer=mixer, position="none")
        ).train()
        model.configure(Recompute(segments=segments))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tokens = torch.arange(1024).view(1, -1) % 50
        with LiveBytes() as live:
            losses = model(tokens, targets=tokens)[0]
            kept = live.now
            losses.sum().backward()
        return kept, live.peak

    (whole_kept, whole_peak), (kept, peak) = measure(1), measure(16)
    assert kept < 0.05 * whole_kept and peak < 0.15 * whole_peak


def test_what_checkpointing_saves() -> None:
    (none, _), (selective, _), (full, peak) = (
        _bytes(kind=kind) for kind in ("none", "selective", "full")
    )
    assert selective < 0.6 * none and full < 0.2 * none
    assert peak < 0.3 * _bytes()[1]


@pytest.mark.skipif(
    cpu_banded.kernel() is None, reason="plain torch holds whole score blocks of a span"
)
def test_lsh_holds_less_than_checkpointed_softmax_attention() -> None:
    """Six layers of width 128 read one long sequence: what `memshard bench lsh` measures
    at 16,384 tokens.
    """
    tokens, peaks = torch.arange(2048)[None] % 50, []
    for kind in ("softmax", "lsh"):
        mixer = MixerConfig(kind=kind, heads=2)  # type: ignore[arg-type]
        residual: Any = "reversible" if kind == "lsh" else "pre"
        model = Transformer(
            ModelConfig(
                vocab_size=50, max_length=2048, layers=6, dim=128, mixer=mixer, residual=residual
            )
        ).train()
        model.configure(Recompute(chunk=128) if kind == "lsh" else Recompute("full"))
        with LiveBytes() as live:
            model(tokens, targets=tokens)[0].mean().backward()
        peaks.append(live.peak)
    assert peaks[1] < 0.9 * peaks[0]
