"""What a model is made of: the settings of the three-slot block and of its memory layers.

Plain frozen dataclasses, so that importing a layer loads nothing but torch. Each field's docstring
is what `memshard config explain` prints.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["relu", "gelu", "swiglu", "squared_relu"]
MixerKind = Literal["softmax", "local", "lsh", "linear", "delta"]
QueryNormKind = Literal["batch", "layer", "layer-half", "rms", "lagged", "none"]
WeightingKind = Literal["softmax", "sigmoid", "relu"]
_MOST_KEYS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """How tokens exchange information."""

    kind: MixerKind = "softmax"
    """Which mixer: softmax (scaled dot-product attention), local (the same over a window), lsh
    (among tokens of a bucket, Reformer), linear (linear attention, the sum rule of fast weights)
    or delta (fast weights with the delta rule).
    """

    pattern: tuple[MixerKind, ...] = ()
    """Kinds of successive layers, repeated to the model's depth; by default all are of `kind`."""

    heads: int = 8
    """Attention heads; divides model.dim."""

    kv_heads: int | None = None
    """Of softmax and local: heads of keys and values, each read by heads / kv_heads query heads; by
    default as many as heads.
    """

    convolution: int = 0
    """Width of causal depthwise convolutions behind the projections of queries, keys and values,
    one kernel a channel (Primer: 3); 0 for none.
    """

    share_qk: bool = False
    """Queries are a linear map of the convolved keys (Primer). Of all but lsh, whose queries are
    its keys.
    """

    window: int = 128
    """Of local: tokens that each one sees, itself included."""

    rounds: int = 2
    """Of lsh: rounds of hashing; more find more, for their price."""

    chunk: int = 64
    """Of lsh: tokens of its bucket that each one sees in a round."""

    buckets: int = 0
    """Of lsh: buckets of a round; 0 for about length / (2 chunk)."""

    rule: Literal["strict", "paper_causal", "hf_compat"] = "strict"
    """Of lsh: whom a token sees. strict: the last `chunk` tokens before it in its bucket, whatever
    follows. paper_causal and hf_compat are the paper's and transformers' chunks, for comparison:
    not strictly causal (later tokens move chunk borders), and without decoding.
    """

    resample: bool = False
    """Of lsh: draw new rotations in every training step, so that models do not rely on those of the
    layer; evaluation has the layer's.
    """

    heads_at_once: int = 0
    """Of lsh: heads whose queries and values are in memory at once in training, at the price of
    computing them again; 0 for all.
    """

    features: Literal["elu", "dpfp", "favor"] = "elu"
    """Of linear and delta: feature map of queries and keys; ELU + 1, DPFP or FAVOR+."""

    feature_width: int = 1
    """Of linear and delta: nu of dpfp (features are 2 nu times a head's width), or random
    directions of favor (features are twice as many).
    """

    feature_norm: Literal["sum", "l2", "none"] | None = None
    """Of linear and delta: make a key's features add up to 1 (sum) or have norm 1 (l2); by default
    sum for delta, none for linear.
    """

    attention_norm: bool | None = None
    """Of linear and delta: read relative to the sum of all keys written; by default true for
    linear, false for delta.
    """

    def __post_init__(self) -> None:
        for name in ("heads", "window", "rounds", "chunk", "feature_width"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"model.mixer.{name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.convolution < 0 or self.convolution == 1:
            raise ValueError(
                f"model.mixer.convolution is {self.convolution}; a width is at least 2 (Primer's "
                "is 3), or 0 for none"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(
                f"model.mixer.kv_heads is {self.kv_heads}; it must be at least 1 and divide "
                f"model.mixer.heads, {self.heads}"
            )
        if self.kv_heads not in (None, self.heads) and {*(self.pattern or (self.kind,))} - {
            "softmax",
            "local",
        }:
            raise ValueError(
                f"model.mixer.kv_heads is {self.kv_heads}, which only the kinds softmax and local "
                "have: leave it out"
            )
        if self.buckets < 0 or self.buckets > 1 and self.buckets % 2:
            raise ValueError(
                f"model.mixer.buckets is {self.buckets}; rotations give pairs of buckets: use 0, "
                "1 or an even number"
            )
        if self.heads_at_once < 0:
            raise ValueError(
                f"model.mixer.heads_at_once is {self.heads_at_once}; it must be at least 0"
            )

    def kind_of(self, layer: int) -> MixerKind:
        """The kind of a layer, counted from 0."""
        return self.pattern[layer % len(self.pattern)] if self.pattern else self.kind


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """The position-wise network of layers without a memory."""

    activation: Activation = "gelu"
    """Nonlinearity: relu, gelu, swiglu (gated) or squared_relu (Primer)."""

    hidden: int | None = None
    """Width of the hidden layer; by default 4 x dim, or 8/3 x dim for swiglu (equal parameters)."""

    norm: Literal["before", "after"] = "before"
    """Where the norm of a block's second half stands: before feedforward and memory, x +
    f(norm(x)), or after them, x + norm(f(x)) (Primer); for residual pre and reversible.
    """

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(
                f"model.feedforward.hidden is {self.hidden}; it must be at least 1, or null for "
                "the default"
            )


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Product-key memory (Lample et al. 2019), and its gated form Memory+ (Berges et al. 2024)."""

    layers: tuple[int, ...] = ()
    """Layers that hold a memory, counted from 0; empty for a model without memory."""

    kind: Literal["pkm", "peer"] = "pkm"
    """What a slot is: a value (product-key memory), or an expert of one neuron, gelu(down . x)
    times a value (PEER; two tables).
    """

    mode: Literal["replace", "add"] = "replace"
    """Whether the memory replaces the layer's feedforward or is added to it."""

    share: bool = False
    """One value table read by all memory layers (each with its own queries and keys) instead of one
    table each.
    """

    keys: int = 128
    """Sub-keys per half; the table has keys squared slots."""

    heads: int = 4
    """Query heads; their readings are summed."""

    topk: int = 32
    """Slots read per head and token."""

    key_dim: int = 256
    """Width of a query, split into two halves; even."""

    value_dim: int | None = None
    """Width of a value; model.dim by default. Another width needs gate: true, which projects it
    back.
    """

    query_norm: QueryNormKind = "batch"
    """Normalisation of queries: batch (the paper's best), layer, layer-half (each half by itself),
    rms, lagged (running statistics of earlier steps: causal) or none.
    """

    weighting: WeightingKind = "softmax"
    """What the scores of the slots that a head reads become: softmax over them, or each by itself
    sigmoid(score) / topk or relu(score) / topk.
    """

    gate: bool = False
    """Memory+: multiply the reading by silu(W1 x), then project by W2."""

    def __post_init__(self) -> None:
        for name in ("keys", "heads", "topk", "key_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"model.memory.{name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.keys > _MOST_KEYS:
            raise ValueError(
                f"model.memory.keys is {self.keys}; more than {_MOST_KEYS:,} (a trillion slots) "
                "is surely a slip"
            )
        if self.topk > self.keys:
            raise ValueError(
                f"model.memory.topk is {self.topk} but there are only {self.keys} sub-keys per "
                "half: "
                f"set model.memory.topk to at most {self.keys}, or raise model.memory.keys"
            )
        if self.key_dim % 2:
            raise ValueError(
                f"model.memory.key_dim is {self.key_dim}; it is split into two halves and must be "
                "even"
            )

    @property
    def tables(self) -> int:
        """Value tables of a memory."""
        return 2 if self.kind == "peer" else 1

    @property
    def slots(self) -> int:
        """Rows of the value table."""
        return self.keys * self.keys


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer of three-slot blocks (mixer, feedforward or memory, residual): decoder,
    encoder, or both.
    """

    vocab_size: int | None = None
    """Tokens in the vocabulary; by default that of the data set's tokenizer."""

    layers: int = 6
    """Blocks, those of an encoder included."""

    encoder_layers: int = 0
    """How many of the blocks, from the first on, are an encoder, which sees a whole text at once.
    0: a language model. Fewer than layers: the others are a decoder that reads the encoder's
    output, for translation. All of them: a model of masked tokens. Encoders and the reading of
    their output take softmax attention, or for linear and delta the sum rule.
    """

    dim: int = 256
    """Width of the residual stream."""

    max_length: int | None = None
    """Longest sequence with learned or axial positions; by default data.length, and the product of
    model.axial.
    """

    mixer: MixerConfig = field(default_factory=MixerConfig)
    """How tokens exchange information."""

    feedforward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    """The position-wise network of layers without a memory."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Product-key memory layers."""

    program: str | None = None
    """Instead of mixer, feedforward and residual: a block of primitives that `memshard search`
    found. The JSON file of a compiled program; runs and checkpoints hold its text.
    """

    residual: Literal["pre", "post", "reversible"] = "pre"
    """How a branch joins: pre is x + f(norm(x)), post is norm(x + f(x)); reversible has two
    streams, y1 = x1 + f(norm(x2)) and y2 = x2 + g(norm(y1)), which backward rebuilds, so that
    activations do not grow with layers (Reformer).
    """

    norm: Literal["layer", "rms", "primer"] = "layer"
    """LayerNorm, RMSNorm or Primer's, which is LayerNorm by another formula."""

    position: Literal["learned", "axial", "sinusoidal", "rotary", "none"] = "learned"
    """How positions enter: added embeddings, embeddings of a position's digits (axial: few rows for
    long texts), added sinusoids, rotated queries and keys, or not at all.
    """

    axial: tuple[int, ...] = ()
    """Lengths of the axes of axial positions, most significant first, such as [1024, 1024] or, of
    images, [height, width, channels]; by default two whose product holds model.max_length.
    """

    tie_head: bool = True
    """Use the embedding matrix as output head. Of two reversible streams it reads the mean; a head
    of its own reads both, side by side.
    """

    adaptive_cutoffs: tuple[int, ...] = ()
    """Adaptive softmax for large vocabularies: numbers of the tokens that begin clusters of rarer
    ones, such as [20000, 40000, 200000]; by default every token has a place of its own in one
    softmax. Needs a head of its own, model.tie_head=false.
    """

    adaptive_division: float = 4.0
    """Of adaptive softmax: how many times narrower each cluster's vectors are than those before it;
    1 for all of model.dim.
    """

    dropout: float = 0.0
    """Dropout of embeddings and branch outputs, drawn from (seed, step, sample, layer, branch)."""

    def __post_init__(self) -> None:
        if self.layers < 1 or self.dim < 1:
            raise ValueError(
                f"model.layers is {self.layers} and model.dim {self.dim}; both must be at least 1"
            )
        if self.program is not None and (
            self.residual != "pre" or self.dropout or self.position == "rotary"
        ):
            raise ValueError(
                "model.program is the whole block, with its own residuals: leave out "
                "model.residual, model.dropout and rotary positions"
            )
        if self.program is None and self.dim % self.mixer.heads:
            raise ValueError(
                f"model.mixer.heads is {self.mixer.heads}; it must divide model.dim, {self.dim}"
            )
        if self.position == "rotary" and self.dim // self.mixer.heads % 2:
            raise ValueError(
                "model.position is rotary, which turns pairs of channels, but a head has "
                f"{self.dim // self.mixer.heads}: "
                "make model.dim / model.mixer.heads even"
            )
        if self.residual == "post" and self.feedforward.norm == "after":
            raise ValueError(
                "model.feedforward.norm is after, and model.residual post, which has its norms "
                "behind the sums: leave one out"
            )
        if self.axial and (
            self.position != "axial" or min(self.axial) < 1 or len(self.axial) > self.dim
        ):
            raise ValueError(
                f"model.axial is {list(self.axial)} and model.position {self.position}: give at "
                "most model.dim lengths of at least 1, "
                "with model.position=axial"
            )
        if self.axial and (self.max_length or 0) > math.prod(self.axial):
            raise ValueError(
                f"model.max_length is {self.max_length}, but model.axial {list(self.axial)} has "
                f"{math.prod(self.axial)} positions: "
                "lengthen an axis, or leave model.max_length out"
            )
        self._check_encoder()
        if (
            list(self.adaptive_cutoffs) != sorted({*self.adaptive_cutoffs})
            or min(self.adaptive_cutoffs, default=1) < 1
        ):
            raise ValueError(
                f"model.adaptive_cutoffs is {list(self.adaptive_cutoffs)}; it must ascend, from 1 "
                "or more"
            )
        if self.adaptive_cutoffs and self.tie_head:
            raise ValueError(
                "model.adaptive_cutoffs gives the head clusters of its own: set "
                "model.tie_head=false"
            )
        if not self.adaptive_division >= 1:
            raise ValueError(
                f"model.adaptive_division is {self.adaptive_division}; it must be at least 1"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")
        for layer in self.memory.layers:
            if not 0 <= layer < self.layers:
                raise ValueError(
                    f"model.memory.layers names layer {layer}, but the model has {self.layers} "
                    "layers: "
                    f"use numbers from 0 to {self.layers - 1}"
                )
        if len(set(self.memory.layers)) < len(self.memory.layers):
            raise ValueError(f"model.memory.layers names a layer twice: {list(self.memory.layers)}")
        if self.memory.kind == "peer" and (
            self.memory.gate or self.memory.value_dim not in (None, self.dim)
        ):
            raise ValueError(
                "model.memory.kind is peer, whose experts take and give model.dim: leave out "
                "model.memory.gate and value_dim"
            )
        if self.memory.value_dim not in (None, self.dim) and not self.memory.gate:
            raise ValueError(
                f"model.memory.value_dim is {self.memory.value_dim} and model.dim {self.dim}: "
                "set model.memory.gate=true, whose output projection brings values back to "
                "model.dim"
            )

    def _check_encoder(self) -> None:
        if not 0 <= self.encoder_layers <= self.layers:
            raise ValueError(
                f"model.encoder_layers is {self.encoder_layers}; it counts some of model.layers, "
                f"{self.layers}"
            )
        if not self.encoder_layers:
            return
        if kinds := {"local", "lsh"} & {
            self.mixer.kind_of(layer) for layer in range(self.encoder_layers)
        }:
            raise ValueError(
                f"model.mixer gives an encoder layer the kind {kinds.pop()}, which only looks "
                "back: use softmax, linear or delta there"
            )
        if (
            self.mixer.convolution
            or self.mixer.share_qk
            or self.mixer.kv_heads not in (None, self.mixer.heads)
        ):
            raise ValueError(
                "model.mixer has convolution, share_qk or kv_heads, which encoders do not: leave "
                "them out"
            )
        if self.program is not None:
            raise ValueError("model.program is a decoder's block: set model.encoder_layers to 0")
        if self.residual == "reversible":
            raise ValueError(
                "model.residual is reversible, for decoders alone: set it to pre or post, or "
                "model.encoder_layers to 0"
            )

    @property
    def translates(self) -> bool:
        """Whether an encoder and a decoder are there."""
        return 0 < self.encoder_layers < self.layers

    @property
    def logits_per_token(self) -> int:
        """Logits of a token in training, about; those of rarer tokens' clusters are few.
        `vocab_size` must be set.
        """
        assert self.vocab_size is not None
        return self.adaptive_cutoffs[0] if self.adaptive_cutoffs else self.vocab_size

    def longest(self, length: int) -> int:
        """`max_length`, or its default where sequences have `length` tokens."""
        return self.max_length or (math.prod(self.axial) if self.axial else length)
