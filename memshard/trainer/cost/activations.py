"""Compute how many bytes a forward pass keeps for its backward pass, in closed form."""

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


def activation_bytes(
    config: ModelConfig,
    length: int,
    layout: LayoutChoice | None = None,
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

    layout: of the tables, if ranks split them. tensor: ranks that share each sequence
    and the large matrices.

    The sum, for values of a bytes (4, or 2 under bf16 or fp16 autocast) and width d, per block:
        mixer       what its kind says (models/mixers/kinds.py)
        two norms   4 d each (twice that for RMSNorm, three times for Primer's)
        feedforward a d, and a hidden for each of the 1 to 4 intermediate results of the activation
        memory      what its kind says (models/memory/kinds.py), and what the layout adds
        dropout     d for each mask
    and 4 vocabulary + (a + 4) d for the head. Checkpointing keeps 4 d for each block or half block
    that is recomputed, all reversible blocks together 8 d; both keep a memory's reads and 4
    value_dim of sums. Where feedforward halves and head are computed for `chunk` tokens of a
    sequence at a time, only one chunk counts. Tensor-parallel ranks keep 1 / tensor of everything
    except what mixers, feedforwards and head gather, a d each. The test compares it with
    what is in memory.
    """
    assert config.vocab_size is not None
    a, d = (2, config.dim) if half else (4, config.dim)
    # The 8 bytes are a norm's mean and inverse deviation, in fp32.
    norm = (4 * d * _NORM_COPIES[config.norm] + 8) / tensor
    mask = d / tensor if config.dropout else 0
    mixers = _mixers(config, length, a, tensor, document_mask)
    if config.program is None:
        mixers = [mixer + norm + mask for mixer in mixers]
    memories = len(config.memory.layers)
    feedforwards = (
        config.layers - (memories if config.memory.mode == "replace" else 0)
        if config.program is None
        else 0
    )
    readers = 1 if layout is not None and layout.layout.within_tensor_group else tensor
    feedforward, memory, reads = _feedforward(config, a, tensor), 0.0, 0.0
    if memories:
        kind, size = MEMORIES[config.memory.kind], MemorySize(config.memory, d, a, key_balance)
        kept_by_reads = kind.reads_kept(size)
        if layout is not None:
            kept_by_reads += config.memory.tables * layout.kept
        memory = (kind.search_kept(size) + kept_by_reads) / readers
        reads = (kept_by_reads + 4 * size.value_dim) / readers
    beside = feedforward if config.memory.mode == "add" else 0
    # What backward computes again at once: the larger of a feedforward and a memory, with its norm.
    largest = (
        norm
        + mask
        + max(feedforward if feedforwards else 0, memory - reads + beside if memories else 0)
    )
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
    if config.residual == "reversible":
        # Backward needs both streams of a block's input, and their gradients.
        return head + 2 * stream + memories * reads, max(*mixers, largest) + 4 * stream
    blocks = config.layers * stream + memories * reads
    if chunk:
        if checkpointing == "full":
            # The inputs of both halves.
            return head + config.layers * stream + blocks, max(*mixers, largest)
        return head + sum(mixers) + blocks, largest
    if checkpointing == "full":
        return head + blocks, max(mixers) + largest
    if checkpointing == "selective":
        return head + sum(mixers) + blocks, largest
    halves = config.layers * (norm + mask) + feedforwards * feedforward + memories * memory
    return head + sum(mixers) + halves, 0.0


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
