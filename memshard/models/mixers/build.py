"""The mixers of a layer."""

from typing import Any, Protocol

from memshard.models.config import ModelConfig
from memshard.models.fast_weights.feature_maps import FeatureMap
from memshard.models.mixers.bidirectional import BidirectionalMixer
from memshard.models.mixers.fast_weights import FastWeightMixer, RuleKind
from memshard.models.mixers.local import LocalMixer
from memshard.models.mixers.lsh import LSHMixer
from memshard.models.mixers.softmax import SoftmaxMixer

Mixer = SoftmaxMixer | LocalMixer | LSHMixer | FastWeightMixer | BidirectionalMixer


class MixerState(Protocol):
    """What a mixer remembers between calls; its own business but for the number of tokens seen."""

    @property
    def length(self) -> int: ...


def build_mixer(config: ModelConfig, layer: int, output_scale: float) -> Mixer:
    """The mixer that the configuration gives a layer."""
    settings = config.mixer
    kind = settings.kind_of(layer)
    rotary = config.position == "rotary"
    if layer < config.encoder_layers:
        return BidirectionalMixer(
            config.dim, settings.heads, _sum_features(config, layer), False, rotary, output_scale
        )
    parts: dict[str, Any] = {"convolution": settings.convolution, "share_qk": settings.share_qk}
    if kind == "softmax":
        return SoftmaxMixer(
            config.dim, settings.heads, rotary, output_scale, kv_heads=settings.kv_heads, **parts
        )
    if kind == "local":
        return LocalMixer(
            config.dim,
            settings.heads,
            settings.window,
            rotary,
            output_scale,
            kv_heads=settings.kv_heads,
            **parts,
        )
    if kind == "lsh":
        shape = settings.rounds, settings.chunk, settings.buckets
        options: dict[str, Any] = {
            "resample": settings.resample,
            "rule": settings.rule,
            "convolution": settings.convolution,
        }
        return LSHMixer(
            config.dim,
            settings.heads,
            *shape,
            layer,
            settings.heads_at_once,
            output_scale,
            **options,
        )
    rule: RuleKind = "delta" if kind == "delta" else "sum"
    # As published: linear attention divides by its sum, the delta rule needs keys that add up to 1.
    normalise = settings.feature_norm or ("sum" if rule == "delta" else "none")
    attention_norm = rule == "sum" if settings.attention_norm is None else settings.attention_norm
    features = FeatureMap(
        settings.features, config.dim // settings.heads, settings.feature_width, normalise
    )
    return FastWeightMixer(
        config.dim, settings.heads, rule, features, attention_norm, rotary, output_scale, **parts
    )


def build_cross(config: ModelConfig, layer: int, output_scale: float) -> BidirectionalMixer:
    """How a decoder's layer reads an encoder's output."""
    return BidirectionalMixer(
        config.dim,
        config.mixer.heads,
        _sum_features(config, layer),
        cross=True,
        output_scale=output_scale,
    )


def _sum_features(config: ModelConfig, layer: int) -> FeatureMap | None:
    """The feature map of attention that sees everything, by the sum rule; None for softmax, which
    stands in for kinds that look back.
    """
    settings = config.mixer
    if settings.kind_of(layer) not in ("linear", "delta"):
        return None
    # As published, linear attention divides by its sum and needs no other normalisation.
    return FeatureMap(
        settings.features,
        config.dim // settings.heads,
        settings.feature_width,
        settings.feature_norm or "none",
    )
