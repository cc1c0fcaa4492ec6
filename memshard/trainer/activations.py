"""How many bytes a forward pass keeps for its backward pass, in closed form."""

from memshard.models.config import ModelConfig
from memshard.trainer.traffic import LayoutChoice

_HIDDEN_COPIES = {"relu": 1, "gelu": 2, "squared_relu": 2, "swiglu": 4}
_QUERY_COPIES = {"batch": 4, "layer": 3, "rms": 3, "lagged": 2, "none": 1}


def activation_bytes(
    config: ModelConfig,
    length: int,
    ranks: int = 1,
    layout: LayoutChoice | None = None,
    *,
    half: bool = False,
    document_mask: bool = False,
    tensor: int = 1,
    key_balance: bool = False,
) -> float:
    """Bytes kept for each token of a micro-batch, loss included; weights and their copies in half precision not. ranks: that split a
    table; tensor: that share each sequence and the large matrices.

    The sum, for a values of bytes (4, or 2 under bf16 or fp16 autocast), width d, per block:
        attention   a d (5, or 7 under autocast, which casts the input once for each of three projections), 4 heads
        two norms   4 d each (twice that for RMSNorm)
        feedforward a d, and a hidden for each of the 1 to 4 intermediate results of the activation
        memory      a d; 4 heads key_dim for each of the 1 to 4 stages of query normalisation;
                    16 heads topk of indices and weights, and what the layout adds; gate 16 value_dim; key balance 8 heads keys
        extras      d for each dropout mask, a length for an explicit mask, a (d + 2 d / heads) for rotary positions
    and 4 vocabulary + (a + 4) d for the head. Tensor-parallel ranks keep 1 / tensor of all but what mixers, feedforwards and head gather,
    a d each. The test compares it with what autograd really saves.
    """
    assert config.vocab_size is not None
    a, d = (2, config.dim) if half else (4, config.dim)
    norm = 4 * d * (2 if config.norm == "rms" else 1) + 8
    # Gathered inputs are cast once, before they travel.
    inputs = 3 if half and tensor == 1 else 1
    attention = a * d * 4 / tensor + 4 * config.mixer.heads / tensor + inputs * a * d
    if config.position == "rotary":
        # Turned queries are contiguous by head, so attention's output is copied back: twice in memory.
        attention += a * (d / tensor + 2 * d // config.mixer.heads)
    if document_mask:
        attention += a * length
    memories = len(config.memory.layers)
    feedforwards = config.layers - (memories if config.memory.mode == "replace" else 0)
    dropout = (2 * config.layers + 1) * d if config.dropout else 0
    head = a * d + 4 * config.vocab_size / tensor + (norm / tensor if config.residual == "pre" else 0)
    readers = 1 if layout is not None and layout.layout == "tensor" else tensor
    memory = _memory(config, a, ranks, layout) + (8 * config.memory.heads * config.memory.keys if key_balance else 0)
    return (
        config.layers * (attention + 2 * norm / tensor)
        + feedforwards * _feedforward(config, a, tensor)
        + memories * memory / readers
        + dropout / tensor
        + head
    )


def _feedforward(config: ModelConfig, a: int, tensor: int) -> float:
    settings = config.feedforward
    gated = settings.activation == "swiglu"
    hidden = settings.hidden or (config.dim * 8 // 3 if gated else config.dim * 4)
    inputs = 2 if gated and a == 2 and tensor == 1 else 1
    return a * (inputs * config.dim + _HIDDEN_COPIES[settings.activation] * hidden / tensor)


def _memory(config: ModelConfig, a: int, ranks: int, layout: LayoutChoice | None) -> float:
    settings = config.memory
    reads = settings.heads * settings.topk
    value_dim = settings.value_dim or config.dim
    queries = 4 * settings.heads * settings.key_dim * _QUERY_COPIES[settings.query_norm]
    lookup = 16.0 * reads
    if settings.kind == "peer":
        # Rows again, products and their gelu, and the product with the weights; the tokens in fp32.
        lookup += 16 * reads + (4 * config.dim if a == 2 else 0)
    if ranks > 1 and layout is not None:
        lookup += settings.tables * {
            "rows, pooled": 24 * reads + 24 * ranks,
            "rows, unique": reads / layout.duplicates * (4 * value_dim + 4),
            "columns": 8 * reads * (ranks - 1),
            "columns of a tensor group": 0,
        }[layout.name]
    gate = (4 + 3 * a) * value_dim + (a * config.dim if a == 2 else 0) if settings.gate else 0
    return a * config.dim + queries + lookup + gate
