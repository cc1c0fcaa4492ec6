"""A small model that the tests of costs vary."""

from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig, NgramConfig

MEMORY = MemoryConfig(layers=(1,), keys=32, heads=4, topk=8, key_dim=64)
MODEL = ModelConfig(
    vocab_size=100, max_length=64, layers=3, dim=64, mixer=MixerConfig(heads=4), memory=MEMORY
)
NGRAM = NgramConfig(layers=(0, 2), rows=100, heads=2)
