"""What a run costs, in closed form: parameters, bytes per rank, traffic, operations. Allocates
nothing.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch

from memshard.models.config import ModelConfig
from memshard.models.fast_weights.feature_maps import FeatureMap
from memshard.models.layers.adaptive_softmax import AdaptiveHead
from memshard.models.memory.table import find_tables
from memshard.models.recompute.checkpointing import Checkpointing
from memshard.models.seq2seq import build_model
from memshard.parallel.mesh import memory_ranks, tensor_ranks
from memshard.parallel.tensor_placement import split_matrices
from memshard.trainer.carried_states import state_tensors
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.cost.activations import activation_bytes
from memshard.trainer.cost.available_memory import available_memory
from memshard.trainer.cost.dense_bytes import dense_bytes, dense_traffic
from memshard.trainer.cost.traffic import LayoutChoice, choose_layout, uniform_duplicates
from memshard.trainer.optim.dense.kinds import DENSE_KINDS


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. active: those of the dense ones that a token multiplies; looked-up
    embeddings are not. largest: of the largest dense one. split: those of the dense ones that
    tensor-parallel ranks share.
    """

    dense: int
    largest: int
    active: int
    split: int
    table: int
    tables: int


@dataclass(frozen=True)
class RankBytes:
    """Bytes on the rank that holds most.

    dense_weights: with the engine's copies in other precision. activations: what one micro-batch's
    forward keeps. workspace: what backward (logits, scores, their gradients; what it computes
    again) or the row update (sorted reads) holds for a moment. reads: what the row update needs of
    all the step's tokens.
    """

    dense_weights: float = 0.0
    dense_gradients: float = 0.0
    dense_moments: float = 0.0
    table_rows: float = 0.0
    table_moments: float = 0.0
    activations: float = 0.0
    workspace: float = 0.0
    reads: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def dense(self) -> float:
        """Weights, gradients and moments of the dense parameters."""
        return self.dense_weights + self.dense_gradients + self.dense_moments

    @property
    def table(self) -> float:
        """Values and moments of the tables."""
        return self.table_rows + self.table_moments


@dataclass(frozen=True)
class Estimate:
    """The costs of a run on `ranks` ranks.

    tensor_ranks: how many of them share the large matrices and each sequence's tokens.
    memory_ranks: how many of them split a table. table_part: rows and columns of each table on a
    rank. micro_batch: sequences a rank processes at once. lookup_traffic: bytes a rank sends for
    each token it looks up, forward and backward; tensor_traffic: for each token of its sequences,
    between tensor-parallel ranks; gradient_traffic and replica_traffic: in a step, for dense
    gradients (and, with ZeRO, parameters) and for row gradients between copies of a table. host:
    bytes in host memory, of tables and optimizer states that lie there; those are not in `bytes`.
    """

    ranks: int
    tensor_ranks: int
    memory_ranks: int
    parameters: Parameters
    table_part: tuple[int, int]
    layout: LayoutChoice
    bytes: RankBytes
    host: RankBytes
    micro_batch: int
    micro_batches: int
    tokens_per_step: int
    flops_per_token: float
    lookup_traffic: float
    tensor_traffic: float
    gradient_traffic: float
    replica_traffic: float


def estimate(
    recipe: Recipe, world: int, vocab_size: int, half: bool = False, duplicates: float | None = None
) -> Estimate:
    """The costs of a recipe on `world` ranks. vocab_size: where model.vocab_size is not set. half:
    under bf16 or fp16 autocast. duplicates: as measured (see `layout_choice`).
    """
    if world < 1:
        raise ValueError(f"the number of ranks is {world}; it must be at least 1")
    length = recipe.data.length
    model = replace(
        recipe.model,
        vocab_size=recipe.model.vocab_size or vocab_size,
        max_length=recipe.model.longest(length),
    )
    assert model.vocab_size is not None
    parameters = count_parameters(model)
    memory, value_dim = model.memory, model.memory.value_dim or model.dim
    layout, holders, tensor = (
        layout_choice(recipe, world, duplicates),
        _holders(recipe, world),
        recipe.parallel.tensor,
    )
    in_pieces = recipe.parallel.share == "sequence" and tensor > 1
    if in_pieces:
        parameters = replace(parameters, split=0)
    # Ranks that share matrices, and a rank's part of each sequence between embedding and loss.
    sharing, part_of_text = (1, tensor) if in_pieces else (tensor, 1)
    dense = parameters.dense - parameters.split + math.ceil(parameters.split / tensor)
    by_columns = layout.layout != "rows"
    part = (
        (memory.slots, math.ceil(value_dim / holders))
        if by_columns
        else (math.ceil(memory.slots / holders), value_dim)
    )
    values = parameters.tables * part[0] * part[1]

    share, micro_batch = _shares(recipe, world)
    tokens = micro_batch * length / part_of_text
    looked_up = share * length / _readers(recipe)
    kept, again = activation_bytes(
        model,
        length,
        holders,
        layout,
        half=half,
        document_mask=recipe.data.document_mask,
        tensor=sharing,
        key_balance=recipe.train.key_balance > 0,
        checkpointing=recipe.train.checkpointing,
        chunk=recipe.train.chunk,
    )
    # The head takes a piece whole.
    activations = tokens * (
        kept + 4 * model.logits_per_token * (in_pieces and recipe.train.chunk > 0)
    )
    reads, update = _read_bytes(model, holders, layout)
    scores = (
        3 * 8 * memory.heads * memory.keys / _readers(recipe) * part_of_text
        if parameters.tables
        else 0
    )
    logits, piece = (
        2 * 4 * model.logits_per_token / sharing,
        min(1, recipe.train.chunk / length) if recipe.train.chunk else 1,
    )
    backward = tokens * max(logits * (piece if tensor == 1 else 1), scores * piece, again)
    if recipe.train.segments > 1:
        # Losses and states are kept, and one piece at a time is computed again.
        backward = (backward + activations) / recipe.train.segments
        activations = micro_batch * (8 * length + recipe.train.segments * state_bytes(model))
    update *= looked_up
    dense_here, dense_in_host = dense_bytes(
        recipe.train,
        DENSE_KINDS[recipe.optimizer.kind],
        dense,
        parameters.largest / sharing,
        world // tensor,
        half,
    )
    beside = {**dense_here, "activations": activations}
    table = {
        "table_rows": values * recipe.tables.value_bytes,
        "table_moments": values * recipe.tables.state_bytes,
        "reads": looked_up * reads,
    }
    if recipe.tables.place == "host":
        on_device, in_host = (
            RankBytes(**beside, workspace=backward),
            RankBytes(**table, **dense_in_host, workspace=update),
        )
    else:
        # The row update runs when activations are gone.
        on_device, in_host = (
            RankBytes(**beside, **table, workspace=max(backward, update - activations)),
            RankBytes(**dense_in_host),
        )
    copies = world // holders
    touched = -math.expm1(-recipe.train.batch * length * memory.heads * memory.topk / memory.slots)
    return Estimate(
        ranks=world,
        tensor_ranks=tensor,
        memory_ranks=holders,
        parameters=parameters,
        table_part=part if parameters.tables else (0, 0),
        layout=layout,
        bytes=on_device,
        host=in_host,
        micro_batch=micro_batch,
        micro_batches=math.ceil(share / micro_batch),
        tokens_per_step=recipe.train.batch * length,
        flops_per_token=flops_per_token(model, length),
        lookup_traffic=len(memory.layers) * memory.tables * layout.sent[layout.name],
        tensor_traffic=_piece_traffic(model, tensor, length)
        if in_pieces
        else _tensor_traffic(model, tensor, 2 if half else 4),
        gradient_traffic=dense_traffic(
            recipe.train, dense, world // tensor, math.ceil(share / micro_batch), half
        )
        + 8 * _others(tensor) * (parameters.dense - parameters.split),
        replica_traffic=8 * _others(copies) * touched * values,
    )


def layout_choice(recipe: Recipe, world: int, duplicates: float | None = None) -> LayoutChoice:
    """How the recipe's tables are laid out on `world` ranks. duplicates: how often a rank reads a
    row in a micro-batch, of the rows it reads, as measured; by default as if reads were spread
    evenly, so that the choice is the recipe's alone.
    """
    memory = recipe.model.memory
    reads = memory.heads * memory.topk
    tokens = _shares(recipe, world)[1] * recipe.data.length / _readers(recipe)
    duplicates = duplicates or uniform_duplicates(tokens * reads, memory.slots)
    holders = _holders(recipe, world)
    value_dim = memory.value_dim or recipe.model.dim
    asked = recipe.parallel
    return choose_layout(
        asked.layout,
        asked.exchange,
        holders,
        value_dim,
        reads,
        duplicates,
        recipe.tables.value_bytes,
    )


def _shares(recipe: Recipe, world: int) -> tuple[int, int]:
    """Sequences of a rank in a step and in a micro-batch, at most."""
    share = math.ceil(recipe.train.batch / (world // tensor_ranks(recipe.parallel.tensor, world)))
    return share, min(recipe.train.micro_batch or share, share)


def _holders(recipe: Recipe, world: int) -> int:
    """How many ranks split a table."""
    asked = recipe.parallel
    holders = memory_ranks(asked.memory, world, asked.tensor)
    return asked.tensor if asked.layout == "tensor" else holders


def _readers(recipe: Recipe) -> int:
    """Over how many ranks the lookups of a sequence are spread."""
    return 1 if recipe.parallel.layout == "tensor" else recipe.parallel.tensor


def _others(ranks: int) -> float:
    """What a rank sends of a byte in half an all-reduce, or in a gather."""
    return (ranks - 1) / ranks


def _tensor_traffic(model: ModelConfig, ranks: int, value_bytes: int) -> float:
    """Bytes a rank sends to its tensor-parallel group for one of its tokens: gathers and sums
    around each mixer and feedforward, forward and backward, and around embedding (whose sum is
    whole, in fp32) and head.
    """
    memories = len(model.memory.layers) if model.memory.mode == "replace" else 0
    return _others(ranks) * model.dim * (value_bytes * (4 * (2 * model.layers - memories) + 2) + 12)


def _piece_traffic(model: ModelConfig, ranks: int, length: int) -> float:
    """Bytes a rank sends to its group for one token of its sequences: maps of fast weights forward,
    their gradients backward.
    """
    mixer, width = model.mixer, model.dim // model.mixer.heads
    features = FeatureMap(mixer.features, width, mixer.feature_width).features
    return (
        4.0 * (ranks - 1) / length * model.layers * mixer.heads * features * (features + 3 * width)
    )


@cache
def count_parameters(config: ModelConfig) -> Parameters:
    """Counts of a model, built on the meta device. `vocab_size` must be set, and `max_length` for
    learned positions.
    """
    # Tables draw a seed when they are built; the caller's generator is none of our business.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(config)
    split = sum(model.get_parameter(name).numel() for name in split_matrices(model, 1))
    tables = [table for _, table in find_tables(model)]
    table = sum(table.weight.numel() for table in tables)
    dense = sum(parameter.numel() for parameter in model.parameters()) - table
    looked_up = [] if config.tie_head else list(model.embedding.parameters())
    if isinstance(model.head, AdaptiveHead):
        looked_up += model.head.tail.parameters()  # each multiplies the few tokens of its cluster
    if model.positions is not None:
        looked_up += model.positions.parameters()
    largest = max(
        parameter.numel()
        for parameter in model.parameters()
        if not any(parameter is table.weight for table in tables)
    )
    active = dense - sum(parameter.numel() for parameter in looked_up)
    return Parameters(
        dense=dense, largest=largest, active=active, split=split, table=table, tables=len(tables)
    )


@cache
def state_bytes(config: ModelConfig) -> int:
    """What the mixers remember of a row, where that keeps its size."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        states = build_model(config).init_states(1, 0)
    return sum(tensor.nbytes for state in states for tensor in state_tensors(state).values())


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Operations of forward and backward for one token: 6 a parameter it multiplies, sub-keys
    included; 6 length dim a layer for causal attention (half the square); 6 heads topk value_dim
    a memory (twice for PEER) for the sums and their gradients. Recomputation, norms and updates
    do not count. `vocab_size` must be set, and `max_length` for learned positions.
    """
    memory = config.memory
    attention = config.layers * length * config.dim
    lookup = (
        len(memory.layers)
        * memory.tables
        * memory.heads
        * memory.topk
        * (memory.value_dim or config.dim)
    )
    # A token of a pair passes the encoder or the decoder: about half of it all.
    return (3.0 if config.translates else 6.0) * (
        count_parameters(config).active + attention + lookup
    )


def _read_bytes(model: ModelConfig, ranks: int, layout: LayoutChoice) -> tuple[float, float]:
    """Per token of the step: bytes kept by all tables' reads, and bytes that the update of one
    table needs besides.
    """
    memory = model.memory
    reads, value_dim = float(memory.heads * memory.topk), memory.value_dim or model.dim
    bags = 4 * value_dim + 8.0
    if layout.name == "rows, unique" and ranks > 1:
        # An owner gets a bag, with its gradient, for every distinct row of every rank; evenly
        # spread, that is what a rank reads.
        reads /= layout.duplicates
        bags *= reads
    elif layout.name == "rows, pooled":
        bags *= ranks
    elif layout.layout == "tensor":
        bags = 4 * value_dim / ranks + 8.0
    else:
        reads, bags = reads * ranks, 4 * value_dim + 8.0 * ranks
    readers_of_a_table = len(memory.layers) if memory.share else min(len(memory.layers), 1)
    return len(memory.layers) * memory.tables * (8 * reads + bags), readers_of_a_table * (
        44 * reads + bags
    )


def check_fits(recipe: Recipe, world: int, vocab_size: int, device: torch.device) -> None:
    """ValueError if a rank's part of the tables does not fit beside the dense model into what the
    device has available.
    """
    cost = estimate(recipe, world, vocab_size)
    needed = cost.bytes.table + cost.host.table
    place = torch.device("cpu") if recipe.tables.place == "host" else device
    available = available_memory(place) - (cost.bytes.dense if place.type == device.type else 0)
    if needed > available:
        raise ValueError(
            f"the value table needs {needed / 1e9:,.1f} GB a rank (values and moments) and "
            f"{max(available, 0) / 1e9:,.1f} GB are "
            "available: lower model.memory.keys, or use more "
            f"ranks{', or set tables.place=host' if place.type == 'cuda' else ''}"
        )


def remedies(
    recipe: Recipe, world: int, vocab_size: int, half: bool, available: float
) -> list[str]:
    """Single changes of the recipe, or of the number of ranks, after which `available` bytes a rank
    are enough.
    """

    def fits(changed: Recipe, ranks: int = world) -> bool:
        return estimate(changed, ranks, vocab_size, half).bytes.total <= available

    found = []
    ranks = next(
        (ranks for ranks in (world << power for power in range(1, 11)) if fits(recipe, ranks)), None
    )
    if ranks is not None:
        found.append(f"use {ranks} ranks")
    if recipe.train.zero == 0 and fits(_changed(recipe, "train", zero=1)):
        found.append("set train.zero=1")
    again: tuple[Checkpointing, ...] = ("selective", "full")
    if recipe.model.residual != "reversible" and recipe.train.checkpointing == "none":
        less = next(
            (each for each in again if fits(_changed(recipe, "train", checkpointing=each))), None
        )
        if less is not None:
            found.append(f"set train.checkpointing={less}")
    micro_batch = estimate(recipe, world, vocab_size).micro_batch // 2
    while micro_batch and not fits(_changed(recipe, "train", micro_batch=micro_batch)):
        micro_batch //= 2
    if micro_batch:
        found.append(f"set train.micro_batch={micro_batch}")
    memory = recipe.model.memory
    in_host = _changed(recipe, "tables", place="host")
    if memory.layers and recipe.tables.place == "device" and fits(in_host):
        found.append(
            "set tables.place=host "
            f"({estimate(in_host, world, vocab_size, half).host.total / 1e9:,.1f} GB a rank in "
            "host memory)"
        )
    if (
        memory.layers
        and recipe.tables.dtype == "fp32"
        and fits(_changed(recipe, "tables", dtype="fp16", rounding="stochastic"))
    ):
        found.append("set tables.dtype=fp16 tables.rounding=stochastic")
    keys = memory.keys // 2 if memory.layers else 0
    while keys >= memory.topk and not fits(
        _changed(recipe, "model", memory=replace(memory, keys=keys))
    ):
        keys //= 2
    if memory.layers and keys >= memory.topk:
        found.append(f"set model.memory.keys={keys}")
    return found


def _changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return replace(recipe, **{section: replace(getattr(recipe, section), **values)})
