"""Compute how many bytes a forward pass keeps for its backward pass, in closed form."""

from collections.abc import Mapping
from dataclasses import dataclass

from memshard.models.config import ModelConfig
from memshard.models.memory.kinds import MEMORIES, MemorySize
from memshard.models.mixers.kinds import LayerSize
from memshard.models.program.primitives import PRODUCTS
from memshard.models.program.program import Program
from memshard.models.recompute.checkpointing import Checkpointing
from memshard.trainer.cost.layout_choice import LayoutChoice

# Arrays of the hidden width. relu keeps its result, which the next matrix keeps anyway; gelu also
# its input, squared ReLU also relu(x); SwiGLU the gate, its silu, the other factor and the product.
_HIDDEN_COPIES = {"relu": 1, "gelu": 2, "gelu_tanh": 2, "squared_relu": 2, "swiglu": 4}
_NORM_COPIES = {"layer": 1, "rms": 2, "primer": 3}
_KEEPS_RESULT = {"EXP", "TANH", "SIGMOID", "ABS_ROOT", "MAX", "MIN", "ATTEND"}
_KEEPS_NEITHER = {
    "ADD",
    "DIFFERENCE",
    "SHIFT",
    "C_MUL",
    "MASK",
    "RED_MEAN",
    "RED_SUM",
    "CUM_SUM",
    "JOIN",
    "LIFT",
}
_KEEPS_NO_INPUT = _KEEPS_NEITHER | _KEEPS_RESULT - {"ATTEND"}


@dataclass(frozen=True)
class _Half:
    """What half a block keeps of a token, and of that what its reads keep, which are not repeated
    where backward computes it again; all in bytes.
    """

    kept: float
    reads: float = 0.0

    @property
    def again(self) -> float:
        """What backward computes again at once."""
        return self.kept - self.reads


def activation_bytes(
    config: ModelConfig,
    length: int,
    layouts: Mapping[str, LayoutChoice] | None = None,
    *,
    half: bool = False,
    document_mask: bool = False,
    tensor: int = 1,
    key_balance: bool = False,
    checkpointing: Checkpointing = "none",
    chunk: int = 0,
) -> tuple[float, float]:
    """Return the bytes kept for each token of a micro-batch, loss included, and the most bytes that
    backward recomputes at once. Weights and their copies in half precision do not count.

    layouts: of the tables, by section, if ranks split them. tensor: ranks that share each sequence
    and the large matrices.

    The sum, for values of a bytes (4, or 2 under bf16 or fp16 autocast) and width d, per block:
        mixer       what its kind says (models/mixers/kinds.py)
        two norms   4 d each (twice that for RMSNorm, three times for Primer's)
        feedforward a d, and a hidden for each of the 1 to 4 intermediate results of the activation
        memory      what its kind says (models/memory/kinds.py), and what the layout adds
        n-grams     what their settings say (models/ngram/kinds.py), and what the layout adds
        dropout     d for each mask
    and 4 vocabulary + (a + 4) d for the head. Checkpointing keeps 4 d for each block or half block
    that is recomputed, all reversible blocks together 8 d; both keep a memory's reads and 4
    value_dim of sums, or the rows that n-grams read. Where feedforward halves and head are computed
    for `chunk` tokens of a sequence at a time, only one chunk counts. Tensor-parallel ranks keep 1
    / tensor of everything except what mixers, feedforwards and head gather, a d each. The test
    compares it with what is in memory.
    """
    assert config.vocab_size is not None
    a, d = (2, config.dim) if half else (4, config.dim)
    # The 8 bytes are a norm's mean and inverse deviation, in fp32.
    norm = (4 * d * _NORM_COPIES[config.norm] + 8) / tensor
    mask = d / tensor if config.dropout else 0
    half_block = norm + mask
    firsts = [
        _Half(mixer + (half_block if config.program is None else 0))
        for mixer in _mixers(config, length, a, tensor, document_mask)
    ]
    feedforward = _Half(_feedforward(config, a, tensor) if config.program is None else 0)
    memory = _memory(config, a, tensor, layouts or {}, key_balance)
    ngram = _ngram(config, a, tensor, layouts or {})
    seconds, at_embedding = [], 0.0
    for layer in range(config.layers):
        with_ngram = layer in config.ngram.layers
        replaced = layer in config.memory.layers and config.memory.mode == "replace"
        parts = [_Half(half_block)]
        if not replaced and not (with_ngram and config.ngram.place == "replace"):
            parts.append(feedforward)
        if layer in config.memory.layers:
            parts.append(memory)
        if with_ngram and config.ngram.place in ("mixer", "values"):
            firsts[layer] = _together([firsts[layer], ngram])
        elif with_ngram and config.ngram.place == "embedding":
            at_embedding = ngram.kept
        elif with_ngram:
            parts.append(ngram)
        seconds.append(_together(parts))
    # What backward computes again at once: the largest half, with its norm.
    largest, largest_first = (max(half.again for half in halves) for halves in (seconds, firsts))
    reads = sum(half.reads for half in seconds)
    reads_of_firsts = sum(half.reads for half in firsts)
    kept_by_firsts = sum(half.kept for half in firsts)
    stream = 4 * d / tensor

    sides = 2 if config.residual == "reversible" and not config.tie_head else 1
    head = (
        mask
        + sides * (a * d + (0 if config.residual == "post" else norm))
        + 4 * config.logits_per_token / tensor
    )
    # Recomputed chunk by chunk, activations of one chunk are in memory.
    share = min(1.0, chunk / length) if chunk else 1.0
    if chunk and tensor == 1:
        # Nothing but its input, which reversible blocks have anyway.
        largest, head = (
            max(largest, head) * share,
            mask + 8 + (0 if config.residual == "reversible" else stream),
        )
    head += at_embedding
    if config.residual == "reversible":
        # Backward needs both streams of a block's input, and their gradients.
        return (
            head + 2 * stream + reads_of_firsts + reads,
            max(largest_first, largest) + 4 * stream,
        )
    blocks = config.layers * stream + reads
    if chunk:
        if checkpointing == "full":
            # The inputs of both halves.
            inputs = config.layers * stream + reads_of_firsts
            return head + inputs + blocks, max(largest_first, largest)
        return head + kept_by_firsts + blocks, largest
    if checkpointing == "full":
        return head + blocks + reads_of_firsts, largest_first + largest
    if checkpointing == "selective":
        return head + kept_by_firsts + blocks, largest
    return head + kept_by_firsts + sum(half.kept for half in seconds), 0.0


def _together(parts: list[_Half]) -> _Half:
    return _Half(sum(part.kept for part in parts), sum(part.reads for part in parts))


def _memory(
    config: ModelConfig,
    a: int,
    tensor: int,
    layouts: Mapping[str, LayoutChoice],
    key_balance: bool,
) -> _Half:
    """Return what a product-key memory keeps."""
    settings, layout = config.memory, layouts.get("memory")
    kind, size = MEMORIES[settings.kind], MemorySize(settings, config.dim, a, key_balance)
    reads = kind.reads_kept(size) + (settings.tables * layout.kept if layout else 0)
    kept = kind.search_kept(size) + reads
    readers = _readers(layout, tensor)
    return _Half(kept / readers, (reads + 4 * size.value_dim) / readers)


def _ngram(config: ModelConfig, a: int, tensor: int, layouts: Mapping[str, LayoutChoice]) -> _Half:
    """Return what a memory that is addressed by tokens keeps."""
    settings, layout = config.ngram, layouts.get("ngram")
    if not settings.layers:
        return _Half(0)
    reads = settings.reads_kept + (layout.kept if layout else 0)
    outputs = config.ngram_outputs
    rows = 4 * settings.reads * settings.width(outputs)
    readers = _readers(layout, tensor)
    return _Half(
        (settings.kept(config.dim, outputs, a) + reads) / readers, (reads + rows) / readers
    )


def _readers(layout: LayoutChoice | None, tensor: int) -> int:
    """Return the number of ranks that read for different tokens of a sequence."""
    return 1 if layout is not None and layout.layout.within_tensor_group else tensor


def _mixers(
    config: ModelConfig, length: int, a: int, tensor: int, document_mask: bool
) -> list[float]:
    """Return what the mixer of each layer keeps."""
    if config.program is not None:
        masked = a * length if document_mask else 0
        return [_program(config.program, a, length) + masked] * config.layers
    rotary = config.position == "rotary"
    size = LayerSize(config.mixer, config.dim, length, a, tensor, rotary, document_mask)
    return [config.mixer.kind_of(layer).kept(size) for layer in range(config.layers)]


def _program(text: str, a: int, length: int) -> float:
    """Return what the calls of a program keep: their inputs, their result, or neither. Under
    autocast each product keeps a separate copy.
    """
    program = Program.from_json(text)
    kept = {
        (value, number if a == 2 and node.op in PRODUCTS else 0)
        for number, node in program.values()
        if node.op not in _KEEPS_NO_INPUT
        for value in node.inputs
    }
    kept |= {(number, 0) for number, node in program.values() if node.op in _KEEPS_RESULT}
    shapes = [(2 if reader else 4, *program.value(value)) for value, reader in kept]
    return float(
        sum(
            size * branches * (length if width is None else width)
            for size, width, branches in shapes
        )
    )


def _feedforward(config: ModelConfig, a: int, tensor: int) -> float:
    settings = config.feedforward
    gated = settings.activation == "swiglu"
    hidden = settings.hidden or (config.dim * 8 // 3 if gated else config.dim * 4)
    return a * (config.dim + _HIDDEN_COPIES[settings.activation] * hidden / tensor)
