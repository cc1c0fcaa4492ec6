"""The kinds of memories, and their settings. Loads no torch.

To add a memory, write a layer with a `from_config` in a file of this folder, and its row in
`MEMORIES` here; settings that no other kind has become fields of `MemoryConfig`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

from memshard.models.memory.table_group import TableGroup

QueryNormKind = Literal["batch", "layer", "layer-half", "rms", "lagged", "none"]
WeightingKind = Literal["softmax", "sigmoid", "relu"]
ScorePrecision = Literal["fp32", "tf32", "bf16x3"]
# fp32 arrays of [heads, key_dim] that a query's way from projection to scores keeps for backward.
_QUERY_COPIES = {"batch": 2, "layer": 3, "layer-half": 3, "rms": 3, "lagged": 2, "none": 1}
_MOST_KEYS = 1_000_000


@dataclass(frozen=True)
class MemorySize:
    """The sizes that the closed forms of a memory depend on.

    dim: of the model. value_bytes: of an activation, 4, or 2 under autocast. key_balance: whether
    train.key_balance is on.
    """

    settings: "MemoryConfig"
    dim: int
    value_bytes: int = 4
    key_balance: bool = False

    @property
    def value_dim(self) -> int:
        """Width of a value."""
        return self.settings.value_dim or self.dim


def product_keys_kept(size: MemorySize) -> float:
    """Return the bytes kept of a token: the input, the 1 to 3 stages of query normalisation, all
    scores for key balance, and 16 value_dim for a gate.
    """
    settings, a = size.settings, size.value_bytes
    kept = 4.0 * settings.heads * settings.key_dim * _QUERY_COPIES[settings.query_norm]
    if settings.gate:
        # The fp32 reading, and in the activations' dtype the gate, its silu and their product.
        kept += (4 + 3 * a) * size.value_dim
    if size.key_balance:
        kept += 8 * settings.heads * settings.keys
    return kept + a * size.dim


def product_keys_workspace(size: MemorySize) -> float:
    """Return the workspace of a token in bytes: three arrays of both halves' scores, in fp32."""
    return 3 * 8.0 * size.settings.heads * size.settings.keys


def weighted_sum_kept(size: MemorySize) -> float:
    """Return the bytes kept of a token: index (int64), weight and score (fp32) of each read."""
    return 16.0 * size.settings.reads


def experts_kept(size: MemorySize) -> float:
    """Return the bytes kept of a token: those of `weighted_sum_kept`, and for each read the row
    again, the product, its gelu and the product with the weight; under autocast also the token
    in fp32.
    """
    return weighted_sum_kept(size) + (
        16 * size.settings.reads + (4 * size.dim if size.value_bytes == 2 else 0)
    )


def check_sizes(prefix: str = "", **sizes: object) -> None:
    """Raise ValueError for a size that is no whole number of at least 1, by its name."""
    for name, value in sizes.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{prefix}{name} is {value!r}; it must be a whole number")
        if value < 1:
            raise ValueError(f"{prefix}{name} is {value}; it must be at least 1")


def check_product_keys(
    keys: int,
    heads: int,
    topk: int,
    key_dim: int,
    weighting: str,
    score_precision: str = "fp32",
    prefix: str = "",
) -> None:
    """Raise ValueError on sizes that do not fit. prefix: before the names, for the message."""
    check_sizes(prefix, keys=keys, heads=heads, topk=topk, key_dim=key_dim)
    # Before anything is allocated: keys is easily mistaken for the number of slots.
    if keys > _MOST_KEYS:
        raise ValueError(
            f"{prefix}keys is {keys}; the limit is {_MOST_KEYS:,} (a trillion slots): check the "
            "number"
        )
    if topk > keys:
        raise ValueError(
            f"{prefix}topk is {topk} but there are only {keys} sub-keys per half: set "
            f"{prefix}topk to at most {keys}, or raise {prefix}keys"
        )
    if key_dim % 2:
        raise ValueError(
            f"{prefix}key_dim is {key_dim}; it is split into two halves and must be even"
        )
    for name, value, kinds in (
        ("weighting", weighting, get_args(WeightingKind)),
        ("score_precision", score_precision, get_args(ScorePrecision)),
    ):
        if value not in kinds:
            raise ValueError(f"{prefix}{name} is {value!r}; expected one of {', '.join(kinds)}")


def check_value_dim(value_dim: int | None, dim: int, gate: bool, prefix: str = "") -> None:
    """Raise ValueError unless values of this width can be added to the stream. prefix: before the
    names, for the message.
    """
    if value_dim is not None:
        check_sizes(prefix, value_dim=value_dim)
    if value_dim not in (None, dim) and not gate:
        raise ValueError(
            f"{prefix}value_dim is {value_dim} and the model's width {dim}: turn on {prefix}gate, "
            "whose output projection brings values back to it"
        )


def _check_product_key_memory(settings: "MemoryConfig", dim: int) -> None:
    _check_search(settings)
    check_value_dim(settings.value_dim, dim, settings.gate, "model.memory.")


def _check_experts(settings: "MemoryConfig", dim: int) -> None:
    _check_search(settings)
    if settings.gate or settings.value_dim not in (None, dim):
        raise ValueError(
            f"model.memory.kind is {settings.kind}, whose experts take and give model.dim: leave "
            "out model.memory.gate and value_dim"
        )


def _check_search(settings: "MemoryConfig") -> None:
    sizes = settings.keys, settings.heads, settings.topk, settings.key_dim
    kinds = settings.weighting, settings.score_precision
    check_product_keys(*sizes, *kinds, "model.memory.")


@dataclass(frozen=True)
class MemoryKind:
    """One row of the registry.

    path: of the class, "module:Class". description: for `memshard config explain`.
    check: called with the settings and model.dim; raises ValueError on what does not fit. tables:
    value tables of a memory. search_kept: bytes a token kept for backward, apart from its reads;
    reads_kept: those of its reads, apart from what the table's layout adds, kept even where the
    rest is computed again. search_workspace: bytes a token that backward needs for a moment.
    """

    name: str
    path: str
    description: str
    check: Callable[["MemoryConfig", int], None]
    tables: int = 1
    search_kept: Callable[[MemorySize], float] = product_keys_kept
    reads_kept: Callable[[MemorySize], float] = weighted_sum_kept
    search_workspace: Callable[[MemorySize], float] = product_keys_workspace


MEMORIES = {
    kind.name: kind
    for kind in (
        MemoryKind(
            "pkm",
            "memshard.models.memory.product_key:ProductKeyMemory",
            "product-key memory, where a slot is a value.",
            _check_product_key_memory,
        ),
        MemoryKind(
            "peer",
            "memshard.models.memory.peer:Peer",
            "a slot is an expert of one neuron, gelu(down . x) times a value (two tables).",
            _check_experts,
            tables=2,
            reads_kept=experts_kept,
        ),
    )
}

if TYPE_CHECKING:
    MemoryName = str
else:
    # So that the allowed values in recipes and `config explain` are those of the registry.
    MemoryName = Literal[tuple(MEMORIES)]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Product-key memory (Lample et al. 2019), and its gated form Memory+ (Berges et al. 2024)."""

    layers: tuple[int, ...] = ()
    """Numbers of the layers with a memory, counted from 0; empty for a model without memory."""

    kind: MemoryName = field(default="pkm", metadata={"choices": MEMORIES})
    """The kind of memory."""

    mode: Literal["replace", "add"] = "replace"
    """Whether the memory replaces the layer's feedforward or is added to it."""

    share: bool = False
    """Let all memory layers read one value table (each with its own queries and keys) instead of
    one table each.
    """

    keys: int = 128
    """Number of sub-keys per half; the table has keys squared slots."""

    heads: int = 4
    """Number of query heads, whose results are summed."""

    topk: int = 32
    """Number of slots read per head and token."""

    key_dim: int = 256
    """Width of a query, which is split into two halves; even."""

    value_dim: int | None = None
    """Width of a value. Default: model.dim. Another width needs gate: true, which projects it back.
    """

    query_norm: QueryNormKind = "batch"
    """Normalisation of queries: batch (the paper's best), layer, layer-half (each half separately),
    rms, lagged (running statistics of earlier steps: causal) or none.
    """

    weighting: WeightingKind = "softmax"
    """How the scores of the slots that a head reads become weights: softmax over them, or each
    score separately: sigmoid(score) / topk or relu(score) / topk.
    """

    score_precision: ScorePrecision = "fp32"
    """Arithmetic of scores where a GPU's kernels search: fp32, or on tensor cores tf32 or bf16x3
    (three bf16 products). On CPUs and in plain torch scores are fp32 whatever this says.
    """

    gate: bool = False
    """Memory+: multiply the result by silu(W1 x), then project it by W2."""

    def __post_init__(self) -> None:
        if self.kind not in MEMORIES:
            raise ValueError(
                f"model.memory.kind is {self.kind!r}; expected one of {', '.join(MEMORIES)}"
            )

    @property
    def tables(self) -> int:
        """Number of value tables of a memory."""
        return MEMORIES[self.kind].tables

    @property
    def slots(self) -> int:
        """Number of rows of a value table."""
        return self.keys * self.keys

    @property
    def reads(self) -> int:
        """Number of rows of each table that a token reads in a layer."""
        return self.heads * self.topk

    def table_group(self, dim: int) -> TableGroup:
        """Return the tables of all layers, in a model `dim` wide."""
        tables = self.tables * (1 if self.share else len(self.layers))
        return TableGroup(
            section="memory",
            slots=(self.slots,) * tables,
            value_dim=self.value_dim or dim,
            reads=self.reads,
            lookups=self.tables * len(self.layers),
            summed=True,
            size_key="model.memory.keys",
        )
