"""The kinds of mixers, and their settings. Loads no torch.

To add a mixer, write a `Mixer` with a `from_config` in a file of this folder, and its row in
`MIXERS` here; settings that no other kind has become fields of `MixerConfig`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

FeatureKind = Literal["elu", "dpfp", "favor"]
FeatureNorm = Literal["sum", "l2", "none"]


@dataclass(frozen=True)
class LayerSize:
    """The sizes that the closed forms of a mixer depend on.

    value_bytes: of an activation, 4, or 2 under autocast. ranks: that share heads (or, for
    `sequence_bytes`, the tokens of a sequence). document_mask: whether
    attention stays inside documents.
    """

    settings: "MixerConfig"
    dim: int
    length: int
    value_bytes: int = 4
    ranks: int = 1
    rotary: bool = False
    document_mask: bool = False


def attention_kept(size: LayerSize) -> float:
    """Return the bytes that attention keeps of a token for backward: for a bytes a value and width
    d, 5 a d and 4 heads; keys and values, two of the 5, take kv_heads / heads; convolutions a d for
    each of their inputs; rotary positions a (d + 2 d / heads); an explicit mask a length.
    """
    settings, a, d = size.settings, size.value_bytes, size.dim
    keys_and_values = 2 * d * (settings.kv_heads or settings.heads) // settings.heads
    kept = a * (2 * d + keys_and_values) / size.ranks + 4 * settings.heads / size.ranks + a * d
    if settings.convolution:
        kept += a * ((0 if settings.share_qk else d) + keys_and_values) / size.ranks
    if size.rotary:
        # Rotated queries are contiguous by head, so attention's output is copied back: it is in
        # memory twice.
        kept += a * (d / size.ranks + 2 * d // settings.heads)
    if size.document_mask:
        kept += a * size.length
    return kept


def attention_multiplications(size: LayerSize) -> float:
    """Return the multiplications of causal attention for a token, in scores and sums."""
    # A token sees length / 2 others in the mean, with dim multiplications for scores and
    # dim for sums.
    return size.length * size.dim


def fast_weight_sequence_bytes(size: LayerSize) -> float:
    """Return the bytes a rank sends for a token of a shared sequence: maps between fast weight
    matrices in forward, their gradients in backward.
    """
    settings, width = size.settings, size.dim // size.settings.heads
    features = feature_count(settings.features, width, settings.feature_width)
    # fp32. A head's map is [features, features + width], the gradients of both its
    # states [features, width].
    return 4.0 * (size.ranks - 1) / size.length * settings.heads * features * (features + 3 * width)


def feature_count(kind: FeatureKind, width: int, feature_width: int) -> int:
    """Return how many features a map makes of a head's `width` channels."""
    # DPFP doubles channels to relu(x), relu(-x), for each of nu shifts; FAVOR+ has exp of either
    # sign of a direction.
    return {"elu": width, "dpfp": 2 * width * feature_width, "favor": 2 * feature_width}[kind]


def bucket_count(length: int, chunk: int) -> int:
    """Return a number of buckets for a length, so that a bucket has about two chunks of tokens and
    its newest chunk misses little of it.

    The paper has more and smaller buckets (chunk = 2 length / buckets), which only works because
    tokens also see other buckets by chance.
    """
    return max(1, (1 << (length - 1).bit_length()) // (2 * chunk)) // 2 * 2 or 1


@dataclass(frozen=True)
class MixerKind:
    """One row of the registry.

    path: of the class, "module:Class". description: for `memshard config explain`.
    whole_text: how an encoder's layer of this kind mixes, by softmax attention or the sum rule;
    None if the kind only looks back. kv_heads: whether model.mixer.kv_heads works. constant_state:
    whether the state keeps its size however long the text, so that training can carry it on. kept:
    bytes a token kept for backward. multiplications: of a token in forward, besides those with
    parameters. sequence_bytes: sent for a token where ranks share the tokens of a sequence; None if
    they cannot.
    """

    name: str
    path: str
    description: str
    whole_text: Literal["softmax", "sum"] | None = None
    kv_heads: bool = False
    constant_state: bool = False
    kept: Callable[[LayerSize], float] = attention_kept
    multiplications: Callable[[LayerSize], float] = attention_multiplications
    sequence_bytes: Callable[[LayerSize], float] | None = None


MIXERS = {
    kind.name: kind
    for kind in (
        MixerKind(
            "softmax",
            "memshard.models.mixers.softmax:SoftmaxMixer",
            "scaled dot-product attention.",
            whole_text="softmax",
            kv_heads=True,
        ),
        MixerKind(
            "local",
            "memshard.models.mixers.local:LocalMixer",
            "the same over a window of recent tokens.",
            kv_heads=True,
        ),
        MixerKind(
            "lsh",
            "memshard.models.mixers.lsh:LSHMixer",
            "attention among tokens that hash to the same bucket (Reformer).",
        ),
        MixerKind(
            "linear",
            "memshard.models.mixers.fast_weights:FastWeightMixer",
            "linear attention, the sum rule of fast weights.",
            whole_text="sum",
            constant_state=True,
            sequence_bytes=fast_weight_sequence_bytes,
        ),
        MixerKind(
            "delta",
            "memshard.models.mixers.fast_weights:FastWeightMixer",
            "fast weights with the delta rule.",
            whole_text="sum",
            constant_state=True,
            sequence_bytes=fast_weight_sequence_bytes,
        ),
    )
}


def names(chosen: Callable[[MixerKind], object], conjunction: str = "and") -> str:
    """Return the names of some kinds for a message, such as "softmax, linear and delta"."""
    *others, last = [kind.name for kind in MIXERS.values() if chosen(kind)]
    return f"{', '.join(others)} {conjunction} {last}" if others else last


if TYPE_CHECKING:
    MixerName = str
else:
    # So that the allowed values in recipes and `config explain` are those of the registry.
    MixerName = Literal[tuple(MIXERS)]


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """The mixers: how tokens exchange information."""

    kind: MixerName = field(default="softmax", metadata={"choices": MIXERS})
    """The kind of mixer."""

    pattern: tuple[MixerName, ...] = ()
    """Kinds of successive layers, repeated to the model's depth. Default: `kind` in all of them."""

    heads: int = 8
    """Number of attention heads; must divide model.dim."""

    kv_heads: int | None = None
    """For softmax and local attention: number of key/value heads, each shared by heads / kv_heads
    query heads. Default: heads.
    """

    convolution: int = 0
    """Width of a causal depthwise convolution after the projections of queries, keys and values,
    with one kernel a channel (Primer: 3); 0 for none.
    """

    share_qk: bool = False
    """Make queries a linear map of the convolved keys (Primer). `lsh` ignores it."""

    window: int = 128
    """For `local`: number of tokens that a token sees, itself included."""

    rounds: int = 2
    """For `lsh`: number of hashing rounds. More miss fewer neighbours, at proportional cost."""

    chunk: int = 64
    """For `lsh`: number of tokens of its bucket that a token sees in a round."""

    buckets: int = 0
    """For `lsh`: number of buckets of a round. 0: chosen when the model is set up, about length /
    (2 chunk) for its training length, whatever texts come later.
    """

    rule: Literal["strict", "paper_causal", "hf_compat"] = "strict"
    """For `lsh`: which tokens a token sees. strict: the last `chunk` tokens before it in its
    bucket, whatever follows. paper_causal and hf_compat cut chunks as the paper and transformers
    do, for comparison: they are not strictly causal (later tokens move the borders of chunks) and
    cannot decode.
    """

    resample: bool = False
    """For `lsh`: draw new rotations in every training step, so that models do not come to rely on
    one set; evaluation always uses the layer's fixed ones.
    """

    heads_at_once: int = 0
    """For `lsh`: process this many heads at a time in training and recompute them in backward, to
    save memory; 0: all at once.
    """

    features: FeatureKind = "elu"
    """For `linear` and `delta`: feature map of queries and keys: ELU + 1, DPFP or FAVOR+."""

    feature_width: int = 1
    """For `linear` and `delta`: nu of dpfp (2 nu features for each channel of a head), or number of
    random directions of favor (two features each).
    """

    feature_norm: FeatureNorm | None = None
    """For `linear` and `delta`: scale a key's features to add up to 1 (sum) or to have norm 1 (l2).
    Default: sum for delta, none for linear.
    """

    attention_norm: bool | None = None
    """For `linear` and `delta`: divide what is read by the sum over all keys written. Default: true
    for linear, false for delta.
    """

    def __post_init__(self) -> None:
        for name in (self.kind, *self.pattern):
            if name not in MIXERS:
                raise ValueError(
                    f"model.mixer.kind is {name!r}; expected one of {', '.join(MIXERS)}"
                )
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
        self._check_kv_heads()
        if self.buckets < 0 or (self.buckets > 1 and self.buckets % 2):
            raise ValueError(
                f"model.mixer.buckets is {self.buckets}; rotations give pairs of buckets: use 0, "
                "1 or an even number"
            )
        if self.heads_at_once < 0:
            raise ValueError(
                f"model.mixer.heads_at_once is {self.heads_at_once}; it must be at least 0"
            )

    def _check_kv_heads(self) -> None:
        if self.kv_heads in (None, self.heads):
            return
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"model.mixer.kv_heads is {self.kv_heads}; it must be at least 1 and divide "
                f"model.mixer.heads, {self.heads}"
            )
        if not all(kind.kv_heads for kind in self.kinds):
            able = names(lambda kind: kind.kv_heads)
            raise ValueError(
                f"model.mixer.kv_heads is {self.kv_heads}, which only the kinds {able} have: "
                "leave it out"
            )

    @property
    def kinds(self) -> tuple[MixerKind, ...]:
        """The kinds of successive layers, before they repeat."""
        return tuple(MIXERS[name] for name in self.pattern or (self.kind,))

    def for_length(self, length: int) -> Self:
        """Return the settings with the number of buckets that `buckets=0` stands for in a model
        trained on sequences of `length` tokens.
        """
        if self.buckets or not any(kind.name == "lsh" for kind in self.kinds):
            return self
        return replace(self, buckets=bucket_count(length, self.chunk))

    def kind_of(self, layer: int) -> MixerKind:
        """Return the kind of a layer, counted from 0."""
        return self.kinds[layer % len(self.kinds)]
