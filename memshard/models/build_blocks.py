"""The blocks of a model, from its settings."""

from dataclasses import replace

from memshard.models.block import Block
from memshard.models.config import ModelConfig
from memshard.models.decoder_block import DecoderBlock
from memshard.models.layers.feedforward import FeedForward
from memshard.models.layers.residual import Residual
from memshard.models.load_class import load_class
from memshard.models.memory.kinds import MEMORIES
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import ValueTable
from memshard.models.mixers.bidirectional import BidirectionalMixer
from memshard.models.mixers.build import build_mixer
from memshard.models.ngram.memory import NgramMemory
from memshard.models.program.mixer import ProgramMixer
from memshard.models.program.program import Program


def build_blocks(config: ModelConfig, ngrams: dict[int, NgramMemory]) -> list[Block]:
    """Return all blocks. ngrams: from `build_ngrams`; one at the embedding is in no block."""
    shared = _build_tables(config) if config.memory.layers and config.memory.share else []
    in_blocks = {} if config.ngram.place == "embedding" else ngrams
    return [
        _build_block(config, layer, shared, in_blocks.get(layer)) for layer in range(config.layers)
    ]


def build_ngrams(config: ModelConfig) -> dict[int, NgramMemory]:
    """Return the memories addressed by tokens, by layer."""
    memories: dict[int, NgramMemory] = {}
    values: ValueTable | None = None
    settings = replace(config.ngram, token_ids=config.ngram.token_ids or config.vocab_size)
    # Values are no branch of the residual stream.
    scale = 1.0 if settings.place == "values" else (2 * config.layers) ** -0.5
    heads = config.mixer.kv_heads or config.mixer.heads
    for layer in settings.layers:
        memories[layer] = NgramMemory(
            settings, config.dim, layer, values, scale, config.ngram_outputs, heads
        )
        values = memories[layer].values if settings.share else None
    return memories


def _build_tables(config: ModelConfig) -> list[ValueTable]:
    memory = config.memory
    return [ValueTable(memory.slots, memory.value_dim or config.dim) for _ in range(memory.tables)]


def _build_memory(config: ModelConfig, shared: list[ValueTable]) -> ProductKeyMemory:
    kind = MEMORIES[config.memory.kind]
    memory: ProductKeyMemory = load_class(kind.path).from_config(
        config, shared or _build_tables(config)
    )
    return memory


def _build_block(
    config: ModelConfig, layer: int, shared: list[ValueTable], ngram: NgramMemory | None
) -> Block:
    memory = _build_memory(config, shared) if layer in config.memory.layers else None
    if config.program is not None:
        added = Residual("whole" if memory is None else "pre", config.norm, config.dim)
        return Block(
            layer,
            _build_program(config),
            None,
            memory,
            (Residual("whole", config.norm, config.dim), added),
            config.dropout,
            ngram,
            config.ngram.place,
        )
    # Two branches a layer write to the stream: their variances then add up to that of one.
    output_scale = (2 * config.layers) ** -0.5
    mixer = build_mixer(config, layer, output_scale)
    feedforward = None
    replaced = memory is not None and config.memory.mode == "replace"
    if not replaced and (ngram is None or config.ngram.place != "replace"):
        feedforward = FeedForward(
            config.dim, config.feedforward.activation, config.feedforward.hidden, output_scale
        )
    norm_after = config.feedforward.norm == "after"
    residuals = (
        Residual(config.residual, config.norm, config.dim),
        Residual(config.residual, config.norm, config.dim, norm_after),
    )
    block = layer, mixer, feedforward, memory, residuals, config.dropout, ngram, config.ngram.place
    if not config.translates or layer < config.encoder_layers:
        return Block(*block)
    return DecoderBlock(
        BidirectionalMixer.from_config(config, layer, output_scale, cross=True),
        Residual(config.residual, config.norm, config.dim),
        *block,
    )


def _build_program(config: ModelConfig) -> ProgramMixer:
    assert config.program is not None
    program = Program.from_json(config.program)
    if program.width != config.dim:
        raise ValueError(
            f"model.dim is {config.dim} but model.program was compiled for {program.width}: set "
            f"model.dim={program.width}"
        )
    return ProgramMixer(program)
