"""The parts of a step on one GPU, without a memory and with one.

The dense part is counted: a pass over the real model, whose tensors are not allocated
(counter.py). What our kernels do is in no operation of torch; their operations and bytes are those
that the code of models/kernels/triton_*.py reads and writes, as functions of the sizes.
"""

import math
from dataclasses import dataclass, replace

import torch

from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.layers.feedforward import FeedForward
from memshard.models.memory.kinds import MemoryConfig
from memshard.models.memory.query_norm import QueryNorm
from memshard.models.seq2seq import build_model
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.alternatives import changed_by
from memshard.trainer.cost.counted.counter import Count, count_pass, unallocated
from memshard.trainer.cost.counted.rates import Rates
from memshard.trainer.cost.parameters import count_parameters
from memshard.trainer.optim.dense.kinds import DENSE_KINDS
from memshard.trainer.precision import DTYPES

_DISTINCT = 0.37
"""So many of the sub-keys of a query's reads are distinct, with 1,024 keys and normal scores, 32
reads; 0.42 with 128 keys and 16. Others are merged before their rows are gathered.
"""
SUGGESTED = {
    "tables.dtype": "bf16",
    "tables.rounding": "stochastic",
    "model.memory.score_precision": "tf32",
}
"""What makes a memory cheaper on a GPU from capability 8.0, at the same loss (docs/gpu.md)."""
LAUNCHES = 70
"""At most so many more has a step with a memory than one without, on the fake CUDA device of the
tests, and no wait more.
"""


@dataclass(frozen=True)
class Part:
    """flops, bytes: counted. seconds: by the rates."""

    name: str
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Explained:
    """The parts of a dense step, of a memory layer, and of the feedforward that it replaces."""

    dense: list[Part]
    memory: list[Part]
    replaced: list[Part]

    @property
    def dense_seconds(self) -> float:
        """Seconds of a step without a memory."""
        return sum(part.seconds for part in self.dense)

    @property
    def seconds(self) -> float:
        """Seconds of a step with it."""
        change = sum(part.seconds for part in self.memory)
        return self.dense_seconds + change - sum(part.seconds for part in self.replaced)

    @property
    def ratio(self) -> float:
        """How many times as long a step takes with the memory."""
        return self.seconds / self.dense_seconds


def explain(
    recipe: Recipe, vocab_size: int, precision: str, rates: Rates, duplicates: float | None = None
) -> Explained:
    """Return the parts of a step of one rank and one micro-batch.

    duplicates: how often a row that is read is read in a step (default: as if reads were spread
    evenly). ValueError for what is not counted: more or fewer than one memory layer, PEER, gates,
    tables in host memory.
    """
    model, settings = recipe.model, recipe.model.memory
    if (
        model.ngram.layers
        or len(settings.layers) != 1
        or settings.kind != MemoryConfig().kind
        or settings.gate
    ):
        raise ValueError("--explain counts models with one product-key memory without a gate")
    if recipe.tables.place == "host" or settings.mode == "add":
        raise ValueError("--explain counts a memory on the device in place of a feedforward")
    length, batch = recipe.data.length, recipe.train.batch
    tokens = length * batch
    sized = replace(model, vocab_size=model.vocab_size or vocab_size).for_length(length)
    without = replace(sized, memory=replace(settings, layers=()))
    dtype = DTYPES[precision]
    dense = _dense(without, batch, length, dtype)
    # The gradient's norm reads it, clipping reads and writes it.
    updated = DENSE_KINDS[recipe.optimizer.kind].update_bytes + 12
    update, other = (updated * count_parameters(config).dense for config in (without, sized))
    # Query and sub-keys have fewer weights than the feedforward.
    fewer = other - update
    return Explained(
        [
            *_parts(dense, rates),
            Part("update of dense weights", 0, update, update / rates.memory),
        ],
        [
            *_memory(recipe, tokens, dtype, rates, duplicates),
            Part("update of dense weights, less the feedforward's", 0, fewer, fewer / rates.memory),
        ],
        _parts(_feedforward(model, tokens, dtype), rates),
    )


def suggest(
    recipe: Recipe,
    explained: Explained,
    precision: str,
    rates: Rates,
    duplicates: float | None = None,
) -> Explained | None:
    """Return what becomes of a step that `explain` has counted with `SUGGESTED`; None where it has
    that already, or does not compute in bf16.
    """
    changed = changed_by(recipe, SUGGESTED)
    if changed == recipe or precision != "bf16":
        return None
    tokens = recipe.data.length * recipe.train.batch
    memory = _memory(changed, tokens, DTYPES[precision], rates, duplicates)
    return replace(explained, memory=[*memory, explained.memory[-1]])


_KINDS = {
    "matrix products": ("mm", "addmm", "bmm"),
    "attention": ("_scaled_dot_product",),
    "loss": ("_log_softmax", "nll_loss"),
    "casts": ("_to_copy",),
    "norms": ("native_layer_norm", "_fused_rms_norm"),
}
"""Parts of a dense step by the beginning of their operations' names; all else is elementwise."""


def _parts(counts: dict[str, Count], rates: Rates) -> list[Part]:
    names = {
        operation: next(
            (kind for kind, begins in _KINDS.items() if operation.startswith(begins)),
            "other elementwise",
        )
        for operation in counts
    }
    parts = []
    for kind in (*_KINDS, "other elementwise"):
        counted = [count for operation, count in counts.items() if names[operation] == kind]
        flops, moved = (sum(getattr(c, what) for c in counted) for what in ("flops", "bytes"))
        rate = rates.attention if kind == "attention" else rates.products
        # Products of these widths are limited by arithmetic, all else by memory.
        parts.append(Part(kind, flops, moved, flops / rate if flops else moved / rates.memory))
    return [part for part in parts if part.bytes]


def _dense(config: ModelConfig, batch: int, length: int, dtype: torch.dtype) -> dict[str, Count]:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(config)
    with unallocated():
        model.to_empty(device="cpu")
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        context = Context(tokens)
        return count_pass(lambda: model(tokens, context, targets=tokens)[0].sum(), dtype)


def _feedforward(config: ModelConfig, tokens: int, dtype: torch.dtype) -> dict[str, Count]:
    settings = config.feedforward
    with unallocated():
        layer = FeedForward(config.dim, settings.activation, settings.hidden)
        x = torch.empty(tokens, config.dim, requires_grad=True)
        return count_pass(lambda: layer(x).sum(), dtype)


def _memory(
    recipe: Recipe, tokens: int, dtype: torch.dtype, rates: Rates, duplicates: float | None
) -> list[Part]:
    settings, dim = recipe.model.memory, recipe.model.dim
    heads, keys, half = settings.heads, settings.keys, settings.key_dim // 2
    queries, reads = tokens * heads, tokens * settings.reads
    values, states = recipe.tables.value_bytes, recipe.tables.state_bytes
    # Rows that at least one of so many even reads hits.
    even = -settings.slots * math.expm1(-reads / settings.slots)
    distinct = reads / duplicates if duplicates else even

    def moved(name: str, size: float, sorts: float = 0.0) -> Part:
        return Part(name, 0, size, size / rates.memory + sorts / rates.sorted)

    def gathered(size: float, array: float, part: Part) -> Part:
        """Return a part that also reads `size` bytes, at random, of an array of so many: from the
        cache, as far as it holds that.
        """
        share = min(1.0, rates.cached / array)
        seconds = size * (share / rates.cache + (1 - share) / rates.memory)
        return replace(part, bytes=part.bytes + size, seconds=part.seconds + seconds)

    with unallocated():
        layer = torch.nn.Linear(dim, heads * settings.key_dim)
        norm = QueryNorm(settings.query_norm, heads, settings.key_dim)
        x = torch.empty(tokens, dim, requires_grad=True)
        # What the layer does on a GPU, where it trains alone.
        normalise = norm.by_torch if norm.kind == "batch" else norm
        query = count_pass(
            lambda: normalise(layer(x).unflatten(-1, (heads, -1)).float()).sum(), dtype
        )
    scores = 2.0 * queries * keys * half * 2
    picked = 2.0 * reads
    read_keys = _DISTINCT * picked
    # As wide as the sub-keys of a side of a head; searches go from one of these to the next.
    side = queries / heads * half * 4
    # 16 bits have half as many digits.
    digits = 0.5 if 2 * heads * keys < 2**15 else 1.0
    sums, weights = tokens * dim * 4.0, reads * 4.0
    # Under autocast to bf16.
    upstream = tokens * dim * (2.0 if dtype == torch.bfloat16 else 4.0)
    cast = sums + upstream if dtype == torch.bfloat16 else 0.0
    return [
        *(replace(part, name=f"query: {part.name}") for part in _parts(query, rates)),
        Part("scores", scores, 0, scores / getattr(rates, settings.score_precision)),
        Part("the best of them", 0, 0, 2 * queries * keys / rates.selected),
        # 64-bit scores with numbers of both halves, written and read; rows and weights.
        moved("pairs of sub-keys", picked * 16 + reads * 8),
        # Rows, weights and their gradients; sub-keys and slopes.
        moved("sub-keys of each query", reads * 12 + picked * (4 * digits + 4)),
        gathered(
            read_keys * half * 4,
            2 * heads * keys * half * 4.0,
            moved("gradient of queries", queries * half * 8 + read_keys * 8),
        ),
        # Sorted numbers with places, tokens and slopes in their order, written and read.
        gathered(
            read_keys * half * 4,
            side,
            moved("gradient of sub-keys", queries * half * 8 + picked * 44, picked * digits),
        ),
        moved("reads", reads * dim * values + sums + 2 * weights),
        moved("gradient of their weights", reads * dim * values + cast + upstream + 2 * weights),
        moved("sort of reads", reads * 44.0, sorts=reads),
        gathered(
            reads * dim * upstream / (tokens * dim),
            upstream,
            moved("gradients of rows", reads * 8),
        ),
        moved("update of rows", distinct * dim * 2 * (values + states)),
        Part("launches", 0, 0, LAUNCHES * rates.launch),
    ]
