"""How many bytes a forward pass keeps for its backward pass, in closed form."""

from memshard.models.config import ModelConfig
from memshard.models.program.primitives import PRODUCTS
from memshard.models.program.program import Program
from memshard.models.recompute.checkpointing import Checkpointing
from memshard.trainer.cost.layout_choice import LayoutChoice

_HIDDEN_COPIES = {"relu": 1, "gelu": 2, "squared_relu": 2, "swiglu": 4}
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
_QUERY_COPIES = {"batch": 2, "layer": 3, "layer-half": 3, "rms": 3, "lagged": 2, "none": 1}


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
    """Bytes kept for each token of a micro-batch, loss included, and bytes that backward computes
    again and holds at once. Weights and their copies in half precision do not count. layout: of
    the tables, if ranks split them. tensor: ranks that share each sequence and the large matrices.

    The sum, for a values of bytes (4, or 2 under bf16 or fp16 autocast), width d, per block:
        attention   a d (5, or 7 under autocast, which casts the input once for each of three
        projections), 4 heads; keys and values, two
                    of the 5, take kv_heads / heads; convolutions a d for each of their inputs
        two norms   4 d each (twice that for RMSNorm, three times for Primer's)
        feedforward a d, and a hidden for each of the 1 to 4 intermediate results of the activation
        memory      a d; 4 heads key_dim for each of the 1 to 4 stages of query normalisation;
                    16 heads topk of indices and weights, and what the layout adds; gate 16
                    value_dim; key balance 8 heads keys
        extras      d for each dropout mask, a length for an explicit mask, a (d + 2 d / heads) for
        rotary positions
    and 4 vocabulary + (a + 4) d for the head. Checkpointing keeps 4 d for each block or half block
    that is computed again, reversible blocks 8 d in all; both keep of a memory its indices, its
    weights and 4 value_dim of sums. Of feedforward halves and head that are computed for `chunk`
    tokens of a sequence at a time only one piece is held. Tensor-parallel ranks keep 1 / tensor of
    all but what mixers, feedforwards and head gather, a d each. The test compares it with what is
    in memory.
    """
    assert config.vocab_size is not None
    a, d = (2, config.dim) if half else (4, config.dim)
    norm = (4 * d * _NORM_COPIES[config.norm] + 8) / tensor
    mask = d / tensor if config.dropout else 0
    # Gathered inputs are cast once, before they travel.
    mixer = config.mixer
    inputs = 3 - mixer.share_qk if half and tensor == 1 else 1
    both = 2 * d * (mixer.kv_heads or mixer.heads) // mixer.heads
    attention = (
        norm + mask + a * (2 * d + both) / tensor + 4 * mixer.heads / tensor + inputs * a * d
    )
    if mixer.convolution:
        attention += a * ((0 if mixer.share_qk else d) + both) / tensor
    if config.program is not None:
        attention = _program(config.program, a, length)
    if config.position == "rotary":
        # Turned queries are contiguous by head, so attention's output is copied back: twice in
        # memory.
        attention += a * (d / tensor + 2 * d // mixer.heads)
    if document_mask:
        attention += a * length
    memories = len(config.memory.layers)
    feedforwards = (
        config.layers - (memories if config.memory.mode == "replace" else 0)
        if config.program is None
        else 0
    )
    readers = 1 if layout is not None and layout.layout.within_tensor_group else tensor
    feedforward, memory = _feedforward(config, a, tensor), 0.0
    if memories:
        memory = (
            _memory(config, a, layout)
            + (8 * config.memory.heads * config.memory.keys if key_balance else 0)
        ) / readers
    lookup = (
        (_lookup(config, a, layout) + 4 * (config.memory.value_dim or d)) / readers
        if memories
        else 0
    )
    beside = feedforward if config.memory.mode == "add" else 0
    largest = (
        norm
        + mask
        + max(feedforward if feedforwards else 0, memory - lookup + beside if memories else 0)
    )
    stream = 4 * d / tensor

    sides = 2 if config.residual == "reversible" and not config.tie_head else 1
    head = (
        mask
        + sides * (a * d + (0 if config.residual == "post" else norm))
        + 4 * config.logits_per_token / tensor
    )
    piece = min(1.0, chunk / length) if chunk else 1.0
    if chunk and tensor == 1:
        # Nothing but its input, which reversible blocks have anyway.
        largest, head = (
            max(largest, head) * piece,
            mask + 8 + (0 if config.residual == "reversible" else stream),
        )
    if config.residual == "reversible":
        # Backward holds both streams of a block's input, and their gradients.
        return head + 2 * stream + memories * lookup, max(attention, largest) + 4 * stream
    if chunk:
        kept, again = (stream, attention) if checkpointing == "full" else (attention, 0.0)
        return head + config.layers * (kept + stream) + memories * lookup, max(again, largest)
    if checkpointing == "full":
        return head + config.layers * stream + memories * lookup, attention + largest
    if checkpointing == "selective":
        return head + config.layers * (attention + stream) + memories * lookup, largest
    return head + config.layers * (
        attention + norm + mask
    ) + feedforwards * feedforward + memories * memory, 0.0


def _program(text: str, a: int, length: int) -> float:
    """What the calls of a program keep: their inputs or their result, or neither. Under autocast
    each product keeps a copy of its own.
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
    inputs = 2 if gated and a == 2 and tensor == 1 else 1
    return a * (inputs * config.dim + _HIDDEN_COPIES[settings.activation] * hidden / tensor)


def _memory(config: ModelConfig, a: int, layout: LayoutChoice | None) -> float:
    settings = config.memory
    value_dim = settings.value_dim or config.dim
    queries = 4 * settings.heads * settings.key_dim * _QUERY_COPIES[settings.query_norm]
    gate = (4 + 3 * a) * value_dim + (a * config.dim if a == 2 else 0) if settings.gate else 0
    return a * config.dim + queries + _lookup(config, a, layout) + gate


def _lookup(config: ModelConfig, a: int, layout: LayoutChoice | None) -> float:
    """Indices, weights and what the layout adds."""
    settings = config.memory
    reads = settings.heads * settings.topk
    lookup = 16.0 * reads
    if settings.kind == "peer":
        # Rows again, products and their gelu, and the product with the weights; the tokens in fp32.
        lookup += 16 * reads + (4 * config.dim if a == 2 else 0)
    if layout is not None:
        lookup += settings.tables * layout.kept
    return lookup
