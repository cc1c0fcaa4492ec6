"""The settings of a model: of its blocks, mixers, feedforwards and memories.

Plain frozen dataclasses that load no torch. Each field's docstring is what `memshard config
explain` prints. The settings of mixers and memories are with the registries of their kinds.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, Self, get_args, get_origin

from memshard.models.memory.kinds import MEMORIES, MemoryConfig
from memshard.models.memory.table_group import TableGroup
from memshard.models.mixers.kinds import MixerConfig, names
from memshard.models.ngram.kinds import NgramConfig

__all__ = [
    "Activation",
    "FeedForwardConfig",
    "MemoryConfig",
    "MixerConfig",
    "ModelConfig",
    "NgramConfig",
]

_WIDEST = 1 << 20
_LIMITS = {
    "layers": 1 << 12,
    "encoder_layers": 1 << 12,
    "vocab_size": 1 << 32,
    "adaptive_cutoffs": 1 << 32,
    "max_length": 1 << 40,
    "axial": 1 << 40,
    "rows": 1 << 40,
}
"""Largest sizes by name, where not `_WIDEST`. Products of three stay below 2^63."""

_NUMBERS: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    int | None: (Integral | None, "a whole number or None"),
    float: (Real, "a number"),
}
"""What a field of a type takes; recipes were checked when they were read."""

Activation = Literal["relu", "gelu", "gelu_tanh", "swiglu", "squared_relu"]


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """The position-wise network of layers without a memory."""

    activation: Activation = "gelu_tanh"
    """Nonlinearity: relu, gelu (the exact one), gelu_tanh (its approximation by tanh, as GPT-2 has
    it), swiglu (gated) or squared_relu (Primer).
    """

    hidden: int | None = None
    """Width of the hidden layer. Default: 4 x dim, or 8/3 x dim for swiglu (equal parameters)."""

    norm: Literal["before", "after"] = "before"
    """Where the norm of a block's second half is applied: before feedforward and memory, x +
    f(norm(x)), or after them, x + norm(f(x)) (Primer). For residual pre and reversible.
    """

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(
                f"model.feedforward.hidden is {self.hidden}; it must be at least 1, or null for "
                "the default"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer of three-slot blocks (mixer, feedforward or memory, residual): decoder,
    encoder, or both.
    """

    vocab_size: int | None = None
    """Number of tokens in the vocabulary. Default: that of the data set's tokenizer."""

    layers: int = 6
    """Number of blocks, those of an encoder included."""

    encoder_layers: int = 0
    """How many of the first blocks are an encoder, which sees a whole text at once. 0: a language
    model. Fewer than layers: the other blocks are a decoder that reads the encoder's output, for
    translation. All of them: a model of masked tokens. Encoders, and decoders that read their
    output, use softmax attention, or the sum rule where model.mixer.kind has it.
    """

    dim: int = 256
    """Width of the residual stream."""

    max_length: int | None = None
    """Longest sequence with learned or axial positions. Default: data.length, or
    the product of model.axial.
    """

    mixer: MixerConfig = field(default_factory=MixerConfig)
    """How tokens exchange information."""

    feedforward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    """The position-wise network of layers without a memory."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Product-key memory layers."""

    ngram: NgramConfig = field(default_factory=NgramConfig)
    """Memories that are addressed by the tokens themselves."""

    program: str | None = None
    """Replaces mixer, feedforward and residual by a block of primitives from `memshard search`: the
    JSON file of a compiled program. Runs and checkpoints keep a copy of its text.
    """

    residual: Literal["pre", "post", "reversible"] = "pre"
    """How a branch joins the stream: pre is x + f(norm(x)), post is norm(x + f(x)); reversible has
    two streams, y1 = x1 + f(norm(x2)) and y2 = x2 + g(norm(y1)), which backward reconstructs, so
    that activation memory does not grow with the number of layers (Reformer).
    """

    norm: Literal["layer", "rms", "primer"] = "layer"
    """LayerNorm, RMSNorm, or Primer's: LayerNorm with the variance as mean(x (x - mean))."""

    position: Literal["learned", "axial", "sinusoidal", "rotary", "none"] = "learned"
    """How positions enter: learned (added embeddings), axial (added embeddings of a position's
    digits: few rows for long texts), sinusoidal (added), rotary (rotated queries and keys) or none.
    """

    axial: tuple[int, ...] = ()
    """Lengths of the axes of axial positions, most significant first, such as [1024, 1024], or for
    images [height, width, channels]. Default: two axes whose product is at least model.max_length.
    """

    tie_head: bool = True
    """Use the embedding matrix as output head. Of two reversible streams a tied head reads the
    mean, a separate head both, concatenated.
    """

    adaptive_cutoffs: tuple[int, ...] = ()
    """Adaptive softmax for large vocabularies: the token numbers at which clusters of rarer tokens
    begin, such as [20000, 40000, 200000]; empty for one softmax over
    all tokens. Needs model.tie_head=false.
    """

    adaptive_division: float = 4.0
    """For adaptive softmax: how many times narrower the vectors of a cluster are than those of the
    cluster before it; 1 gives all of them width model.dim.
    """

    dropout: float = 0.0
    """Dropout rate of embeddings and branch outputs; draws do not depend on the parallel layout."""

    def __post_init__(self) -> None:
        _check_limits(self)
        if self.layers < 1 or self.dim < 1:
            raise ValueError(
                f"model.layers is {self.layers} and model.dim {self.dim}; both must be at least 1"
            )
        for name in ("vocab_size", "max_length"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"model.{name} is {size}; it must be at least 1, or null")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")
        _check_memory(self)
        _check_ngram(self)
        _check_block(self)
        _check_positions(self)
        _check_encoder(self)
        _check_adaptive_softmax(self)

    @property
    def ngram_outputs(self) -> int:
        """Width of what an n-gram memory adds: of the stream, or of all heads' values."""
        if self.ngram.place != "values":
            return self.dim
        return self.dim // self.mixer.heads * (self.mixer.kv_heads or self.mixer.heads)

    @property
    def translates(self) -> bool:
        """True if the model has both an encoder and a decoder."""
        return 0 < self.encoder_layers < self.layers

    @property
    def logits_per_token(self) -> int:
        """Approximate number of logits computed per token in training; ignores the rare-token
        clusters of adaptive softmax. `vocab_size` must be set.
        """
        assert self.vocab_size is not None
        return self.adaptive_cutoffs[0] if self.adaptive_cutoffs else self.vocab_size

    @property
    def table_groups(self) -> list[TableGroup]:
        """The value tables, by the section that describes them. `vocab_size` must be set."""
        assert self.vocab_size is not None
        groups = [self.memory.table_group(self.dim)] if self.memory.layers else []
        if self.ngram.layers:
            groups.append(self.ngram.table_group(self.ngram_outputs, self.vocab_size))
        return groups

    def longest(self, length: int) -> int:
        """Return `max_length`, or its default for sequences of `length` tokens."""
        return self.max_length or (math.prod(self.axial) if self.axial else length)

    def for_length(self, length: int) -> Self:
        """Return the settings with what training on sequences of `length` tokens decides filled
        in: the longest sequence, and the buckets of LSH.
        """
        return replace(self, max_length=self.longest(length), mixer=self.mixer.for_length(length))


def check_kind(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError for a number that is none, or a choice that is not there, in a setting that
    was made in Python. kind: the type of its field.
    """
    wanted, words = _NUMBERS.get(kind, (object, ""))
    if not isinstance(value, wanted) or (words and isinstance(value, bool)):
        raise ValueError(f"{name} is {value!r}; it must be {words}")
    if get_origin(kind) is Literal and value not in get_args(kind):
        choices = ", ".join(map(str, get_args(kind)))
        raise ValueError(f"{name} is {value!r}; choose one of {choices}")


def _check_limits(section: Any, prefix: str = "model.") -> None:
    """Raise ValueError for a size that no model has: recipes come with checkpoints, too, and even
    on the meta device a model is built layer by layer, of tensors of fewer than 2^62 values.
    """
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            _check_limits(value, f"{prefix}{item.name}.")
            continue
        check_kind(f"{prefix}{item.name}", value, item.type)
        limit = _LIMITS.get(item.name, _WIDEST)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and number > limit:
                raise ValueError(
                    f"{prefix}{item.name} is {number}; the limit is {limit:,}: check the number"
                )


def _check_memory(model: ModelConfig) -> None:
    _check_layers("model.memory", model.memory.layers, model.layers)
    MEMORIES[model.memory.kind].check(model.memory, model.dim)


def _check_ngram(model: ModelConfig) -> None:
    layers = model.ngram.layers
    if not layers:
        return
    _check_layers("model.ngram", layers, model.layers)
    model.ngram.width(model.ngram_outputs)
    if model.ngram.place == "values" and (model.program is not None or model.mixer.heads_at_once):
        raise ValueError(
            "model.ngram.place is values, which model.program and model.mixer.heads_at_once do not "
            "have: use place=mixer, or leave them out"
        )
    if model.encoder_layers:
        raise ValueError(
            "model.ngram has layers and model.encoder_layers is "
            f"{model.encoder_layers}: n-grams are for language models, so leave one out"
        )
    both = set(layers) & set(model.memory.layers)
    if model.ngram.place == "replace" and both:
        raise ValueError(
            f"model.ngram.place is replace, but layer {min(both)} has a product-key memory: use "
            "place=feedforward, or other layers"
        )


def _check_layers(section: str, layers: tuple[int, ...], count: int) -> None:
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(
                f"{section}.layers names layer {layer}, but the model has {count} "
                f"layers: use numbers from 0 to {count - 1}"
            )
    if len(set(layers)) < len(layers):
        raise ValueError(f"{section}.layers names a layer twice: {list(layers)}")


def _check_block(model: ModelConfig) -> None:
    heads = model.mixer.heads
    if model.program is not None:
        if model.residual != "pre" or model.dropout or model.position == "rotary":
            raise ValueError(
                "model.program is the whole block, with its own residuals: leave out "
                "model.residual, model.dropout and rotary positions"
            )
    elif model.dim % heads:
        raise ValueError(f"model.mixer.heads is {heads}; it must divide model.dim, {model.dim}")
    if model.position == "rotary" and model.dim // heads % 2:
        raise ValueError(
            "model.position is rotary, which turns pairs of channels, but a head has "
            f"{model.dim // heads}: make model.dim / model.mixer.heads even"
        )
    if model.residual == "post" and model.feedforward.norm == "after":
        raise ValueError(
            "model.feedforward.norm is after, and model.residual post, which normalises the sums: "
            "leave one out"
        )


def _check_positions(model: ModelConfig) -> None:
    axes = model.axial
    if axes and (model.position != "axial" or min(axes) < 1 or len(axes) > model.dim):
        raise ValueError(
            f"model.axial is {list(axes)} and model.position {model.position}: give at most "
            "model.dim lengths of at least 1, with model.position=axial"
        )
    if axes and (model.max_length or 0) > math.prod(axes):
        raise ValueError(
            f"model.max_length is {model.max_length}, but model.axial {list(axes)} has "
            f"{math.prod(axes)} positions: lengthen an axis, or leave model.max_length out"
        )


def _check_encoder(model: ModelConfig) -> None:
    mixer = model.mixer
    if not 0 <= model.encoder_layers <= model.layers:
        raise ValueError(
            f"model.encoder_layers is {model.encoder_layers}; it counts some of model.layers, "
            f"{model.layers}"
        )
    if not model.encoder_layers:
        return
    kinds = (mixer.kind_of(layer) for layer in range(model.encoder_layers))
    if backward := next((kind for kind in kinds if kind.whole_text is None), None):
        raise ValueError(
            f"model.mixer gives an encoder layer the kind {backward.name}, which only looks back: "
            f"use {names(lambda kind: kind.whole_text, 'or')} there"
        )
    if mixer.convolution or mixer.share_qk or mixer.kv_heads not in (None, mixer.heads):
        raise ValueError(
            "model.mixer has convolution, share_qk or kv_heads, which encoders do not: leave "
            "them out"
        )
    if model.program is not None:
        raise ValueError("model.program is a decoder's block: set model.encoder_layers to 0")
    if model.residual == "reversible":
        raise ValueError(
            "model.residual is reversible, for decoders alone: set it to pre or post, or "
            "model.encoder_layers to 0"
        )


def _check_adaptive_softmax(model: ModelConfig) -> None:
    cutoffs = model.adaptive_cutoffs
    if list(cutoffs) != sorted({*cutoffs}) or min(cutoffs, default=1) < 1:
        raise ValueError(
            f"model.adaptive_cutoffs is {list(cutoffs)}; it must ascend, from 1 or more"
        )
    if cutoffs and model.tie_head:
        raise ValueError(
            "model.adaptive_cutoffs gives the head clusters of its own: set model.tie_head=false"
        )
    if not model.adaptive_division >= 1:
        raise ValueError(
            f"model.adaptive_division is {model.adaptive_division}; it must be at least 1"
        )
