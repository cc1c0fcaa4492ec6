"""The names and the orders of numbers that two public codes have for n-gram memories.

    engram  deepseek-ai/Engram, engram_demo_v1.py: `Engram` of a layer. Its linear maps have biases,
            which ours lack; it computes multipliers and primes from its settings.
    qwen    transformers, qwen4_exp: `Qwen4ExpTextPLELayer` of a layer. Its norms' weights are less
            by 1; its table is in shards.

Both with one residual stream. Rows of tables are in one order everywhere: by order of n-grams, then
head, then remainder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memshard.models.config import ModelConfig
from memshard.models.ngram.memory import NgramMemory

SHARDS = 128
"""Parts of Qwen's published table; its rows are a multiple of it."""

Change = Callable[[NgramMemory, Tensor], Tensor]


def _same(memory: NgramMemory, value: Tensor) -> Tensor:
    return value


def _flat(memory: NgramMemory, value: Tensor) -> Tensor:
    return value.flatten()


def _longest(memory: NgramMemory, multipliers: Tensor) -> Tensor:
    return multipliers[-1, 0]


def _kernel(memory: NgramMemory, weight: Tensor) -> Tensor:
    # Ours begin with the token itself, torch's end with it.
    return weight.view(memory.dim, 1, -1).flip(-1)


def _weight(memory: NgramMemory, kernel: Tensor) -> Tensor:
    return kernel.flip(-1).flatten()


def _less_one(memory: NgramMemory, weight: Tensor) -> Tensor:
    return weight - 1


def _one_more(memory: NgramMemory, weight: Tensor) -> Tensor:
    return weight + 1


@dataclass(frozen=True)
class Part:
    """A parameter or buffer of a layer. ours, theirs: its names. there: makes of ours what it is
    there. back: the reverse, for parameters.
    """

    ours: str
    theirs: str
    there: Change = _same
    back: Change = _same


@dataclass(frozen=True)
class Format:
    """One code's format.

    prefix: of a layer's names, where {} is its number. table: the table's name, where {} is the
    number of a shard. zeros: names of biases. config: makes the settings that the code reads.
    """

    prefix: str
    parts: tuple[Part, ...]
    table: str
    config: Callable[[ModelConfig, dict[int, NgramMemory]], dict[str, Any]]
    zeros: tuple[str, ...] = ()


def _engram_config(model: ModelConfig, memories: dict[int, NgramMemory]) -> dict[str, Any]:
    settings = model.ngram
    addresses = {layer: memory.addresses for layer, memory in memories.items()}
    return {
        "engram_vocab_size": [settings.rows] * (settings.length - 1),
        "max_ngram_size": settings.length,
        "n_embed_per_ngram": settings.tables_of_order * settings.width(model.dim),
        "n_head_per_ngram": settings.tables_of_order,
        "layer_ids": list(settings.layers),
        "pad_id": settings.padding,
        "seed": settings.seed,
        "kernel_size": settings.kernel,
        "hidden_size": model.dim,
        "hc_mult": 1,
        # What the demo computes from these and from its tokenizer.
        "tokenizer_vocab_size": settings.token_ids or model.vocab_size,
        "multipliers": {n: a.multipliers[-1, 0].tolist() for n, a in addresses.items()},
        "primes": {n: a.moduli.tolist() for n, a in addresses.items()},
    }


def _qwen_config(model: ModelConfig, memories: dict[int, NgramMemory]) -> dict[str, Any]:
    settings = model.ngram
    return {
        "vocab_size": settings.token_ids or model.vocab_size,
        "hidden_size": model.dim,
        "hc_count": 1,
        "ple_layer_ids": [layer + 1 for layer in settings.layers],
        "ple_embed_dim": settings.reads * settings.width(model.dim),
        "ple_conv_kernel_size": settings.kernel,
        "ngram_size": settings.length,
        "heads_per_ngram": settings.tables_of_order,
        "ngram_vocab_size_base": settings.rows,
        "make_ngram_vocab_size_divisible_by": SHARDS,
        "seed": settings.seed,
        "split_ngram_parts": SHARDS,
        "eos_token_id": settings.padding,
        "rms_norm_eps": 1e-6,
    }


FORMATS = {
    "engram": Format(
        "layers.{}.engram.",
        (
            Part("output.weight", "value_proj.weight"),
            Part("key.weight", "key_projs.0.weight"),
            Part("key_norm.weight", "norm1.0.weight"),
            Part("query_norm.weight", "norm2.0.weight"),
            Part("convolution_norm.weight", "short_conv.norms.0.weight"),
            Part("convolutions.output.weight", "short_conv.conv.weight", _kernel, _weight),
            Part("addresses.offsets", "multi_head_embedding.offsets", _flat),
        ),
        "multi_head_embedding.embedding.weight",
        _engram_config,
        ("value_proj.bias", "key_projs.0.bias"),
    ),
    "qwen": Format(
        "model.language_model.layers.{}.ple.",
        (
            Part("output.weight", "value_proj.weight"),
            Part("key.weight", "key_proj.weight"),
            Part("key_norm.weight", "norm_key.weight", _less_one, _one_more),
            Part("query_norm.weight", "norm_query.weight", _less_one, _one_more),
            Part("convolution_norm.weight", "norm_conv.weight", _less_one, _one_more),
            Part("convolutions.output.weight", "conv1d.weight", _kernel, _weight),
            Part("addresses.multipliers", "ple_embedding.layer_multipliers", _longest),
            Part("addresses.moduli", "ple_embedding.ngram_heads_vocab_sizes", _flat),
            Part("addresses.offsets", "ple_embedding.ngram_heads_offsets", _flat),
        ),
        "ple_embedding.ngram_embedding.shard_{}.weight",
        _qwen_config,
    ),
}
"""By the rule of the n-grams."""


def format_of(model: ModelConfig) -> Format:
    """Return the format of a model's n-gram memories. ValueError if no public code has one."""
    settings = model.ngram
    problems = {
        "layers is empty": not settings.layers,
        f"rule is {settings.rule}": settings.rule not in FORMATS,
        f"gate is {settings.gate}, not context": settings.gate != "context",
        f"place is {settings.place}, not mixer": settings.place != "mixer",
        "convolution is 0": not settings.kernel,
        "share is true": settings.share and len(settings.layers) > 1,
        "layers is not in order": [*settings.layers] != sorted(settings.layers),
    }
    for problem, true in problems.items():
        if true:
            raise ValueError(
                f"model.ngram.{problem}, for which there is no public format: those are of rules "
                f"{' and '.join(FORMATS)}, before mixers, a table each, gated by context"
            )
    return FORMATS[settings.rule]
