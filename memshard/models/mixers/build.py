"""The mixer of a layer."""

from memshard.models.config import ModelConfig
from memshard.models.load_class import load_class
from memshard.models.mixers.bidirectional import BidirectionalMixer
from memshard.models.mixers.mixer import Mixer


def build_mixer(config: ModelConfig, layer: int, output_scale: float) -> Mixer:
    """Return the mixer that the settings ask for. output_scale: see `Mixer`."""
    if layer < config.encoder_layers:
        return BidirectionalMixer.from_config(config, layer, output_scale)
    kind = config.mixer.kind_of(layer)
    mixer: Mixer = load_class(kind.path).from_config(config, layer, output_scale)
    return mixer
