"""A small transformer for tests."""

from typing import Any

import torch

from memshard.models.config import FeedForwardConfig, MemoryConfig, MixerConfig, ModelConfig
from memshard.models.initialize import initialize
from memshard.models.seq2seq import build_model
from memshard.models.transformer import Transformer

VOCABULARY = 23


MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "local": {"kind": "local", "window": 3},
    "lsh": {"kind": "lsh", "chunk": 2, "rounds": 3, "buckets": 4},
    "linear": {"kind": "linear"},
    "delta": {"kind": "delta", "features": "dpfp", "feature_width": 2},
    "normalised delta": {
        "kind": "delta",
        "features": "favor",
        "feature_width": 8,
        "attention_norm": True,
    },
    "Primer": {"convolution": 3, "share_qk": True},
    "convolved local, grouped heads": {
        "kind": "local",
        "window": 3,
        "convolution": 4,
        "kv_heads": 1,
    },
    "convolved lsh": {
        "kind": "lsh",
        "chunk": 2,
        "buckets": 4,
        "heads_at_once": 1,
        "convolution": 2,
    },
    "convolved delta": {"kind": "delta", "convolution": 3, "share_qk": True},
    "mixed": {"pattern": ("local", "lsh"), "chunk": 4, "buckets": 2, "heads_at_once": 1},
}
"""Settings of a mixer for each kind, small enough to matter within ten tokens."""


def tiny_config(
    memory: dict[str, Any] | None = None,
    activation: Any = "gelu_tanh",
    mixer: dict[str, Any] | None = None,
    norm_after: bool = False,
    **changes: Any,
) -> ModelConfig:
    """Return a config of three layers of width 16; memories are in layers 1 and 2
    unless told otherwise.
    """
    defaults: dict[str, Any] = {"layers": (1, 2), "keys": 6, "heads": 2, "topk": 3, "key_dim": 8}
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "layers": 3,
        "dim": 16,
        "max_length": 32,
        **changes,
    }
    return ModelConfig(
        mixer=MixerConfig(heads=2, **(mixer or {})),
        feedforward=FeedForwardConfig(
            activation=activation, norm="after" if norm_after else "before"
        ),
        memory=MemoryConfig(**(defaults | (memory or {}))),
        **sizes,
    )


def tiny_model(
    config: ModelConfig | None = None, seed: int = 0, spread: float = 0.3
) -> Transformer:
    """Return the model in fp64. spread: size of a random change to every weight, so that no two
    parts are alike or nearly zero.
    """
    model = build_model(config or tiny_config())
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.double()


def tiny_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
