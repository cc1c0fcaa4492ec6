"""The rules by which token ids choose rows, and the settings of n-gram tables. Loads no torch.

To add a rule, write what builds its `Addresses` in rules.py, and its row in `RULES` here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

from memshard.models.memory.table_group import TableGroup
from memshard.models.ngram.primes import first_primes

Place = Literal["embedding", "mixer", "feedforward", "replace", "values"]
GateKind = Literal["none", "scalar", "context", "glu", "heads"]
TokenMapKind = Literal["none", "text"]

Sizes = Callable[["NgramConfig", int, int], tuple[int, ...]]
"""Rows of each read's part of a table, by order, then head, from the settings, the number of token
ids and which of the tables it is, counted from 0.
"""


def token_sizes(settings: "NgramConfig", token_ids: int, table: int) -> tuple[int, ...]:
    """Return one row for each token id."""
    return (token_ids,)


def equal_sizes(settings: "NgramConfig", token_ids: int, table: int) -> tuple[int, ...]:
    """Return `rows` for each read."""
    return (settings.rows,) * settings.reads


def odd_sizes(settings: "NgramConfig", token_ids: int, table: int) -> tuple[int, ...]:
    """Return successive odd numbers above `rows`, the same in each table."""
    return tuple(settings.rows // 2 * 2 + 2 * read + 1 for read in range(settings.reads))


def prime_sizes(settings: "NgramConfig", token_ids: int, table: int) -> tuple[int, ...]:
    """Return successive primes of at least `rows`; each table continues where the last ended."""
    primes = first_primes(settings.rows, (table + 1) * settings.reads)
    return primes[table * settings.reads :]


@dataclass(frozen=True)
class NgramRule:
    """One row of the registry.

    path: of what builds the addresses, "module:function". description: for `memshard config
    explain`. order, heads: defaults. orders: shortest and longest `order` that the rule has;
    most_heads: of an order, None if any number. sizes: rows of each read's part of a table.
    multiple: the table's rows are rounded up to it. pad: what stands for a token before the first,
    by default.
    """

    name: str
    path: str
    description: str
    order: int
    heads: int
    sizes: Sizes
    orders: tuple[int, int | None] = (2, None)
    most_heads: int | None = None
    multiple: int = 1
    pad: Literal["zero", "eos"] = "zero"


RULES = {
    rule.name: rule
    for rule in (
        NgramRule(
            "bigram",
            "memshard.models.ngram.rules:bigram",
            "the last two ids times two constants, combined by XOR, modulo rows - 1 "
            "(modded-nanogpt).",
            order=2,
            heads=1,
            sizes=equal_sizes,
            orders=(2, 2),
            most_heads=1,
        ),
        NgramRule(
            "longcat",
            "memshard.models.ngram.rules:longcat",
            "an n-gram's ids as digits of one number, modulo successive odd numbers above rows "
            "(over-encoding; LongCat).",
            order=3,
            heads=4,
            sizes=odd_sizes,
        ),
        NgramRule(
            "engram",
            "memshard.models.ngram.rules:engram",
            "ids times random odd numbers, combined by XOR, modulo successive primes from rows "
            "(DeepSeek Engram).",
            order=3,
            heads=8,
            sizes=prime_sizes,
        ),
        NgramRule(
            "qwen",
            "memshard.models.ngram.rules:qwen",
            "as engram, with splitmix64's multipliers, and eos before the first token (Qwen PLE).",
            order=3,
            heads=8,
            sizes=prime_sizes,
            multiple=128,
            pad="eos",
        ),
        NgramRule(
            "token",
            "memshard.models.ngram.rules:token",
            "a row for each id (value embeddings, per-layer embeddings, STEM).",
            order=1,
            heads=1,
            sizes=token_sizes,
            orders=(1, 1),
            most_heads=1,
        ),
    )
}

if TYPE_CHECKING:
    RuleName = str
else:
    # So that the allowed values in recipes and `config explain` are those of the registry.
    RuleName = Literal[tuple(RULES)]


_MOST = {"order": 64, "heads": 1024, "rows": 1 << 40, "convolution": 64}
"""Largest sizes: products of an id and a row's number stay below 2^63 for 2^22 ids, and primes are
found one after the other.
"""


@dataclass(frozen=True, kw_only=True)
class NgramConfig:
    """Tables whose rows are chosen by the ids of the last tokens (n-grams)."""

    layers: tuple[int, ...] = ()
    """Numbers of the layers with a table, counted from 0; empty for a model without; 0 for a table
    at the embedding.
    """

    rule: RuleName = field(default="engram", metadata={"choices": RULES})
    """How token ids choose rows."""

    place: Place = "mixer"
    """Where a token's rows enter: at the embedding, before a layer's mixer, beside its feedforward
    or in place of it (replace), or into the values of its attention.
    """

    share: bool = False
    """Let all layers read one table, at the same rows, instead of one each."""

    order: int | None = None
    """Number of tokens of the longest n-gram; there are tables for all from 2 to it. Default: 3; of
    bigram 2, of token 1, which have no other.
    """

    heads: int | None = None
    """Number of tables of each order, each with its own hash. Default: 8; of longcat 4, of bigram
    and token 1, which have no other.
    """

    rows: int = 65536
    """Number of rows of each order's and head's table, about: engram and qwen take primes from it
    up, longcat odd numbers; token has a row for each id whatever this says.
    """

    value_dim: int | None = None
    """Width of a row. Default: model.dim / rows that a token reads, which must be whole."""

    token_ids: int | None = None
    """Number of ids that n-grams are made of. Default: model.vocab_size, or what token_map leaves
    of it.
    """

    token_map: TokenMapKind = "none"
    """Which tokens count as one. text: those whose text agrees after folding accents, case and
    white space.
    """

    pad: int | None = None
    """Id, as token_map numbers them, that stands before a text's first token. Default: 0; of qwen
    that of eos.
    """

    eos: int | None = None
    """Id, before token_map, of the token that ends a document. Default: the tokenizer's."""

    reset: bool = True
    """Keep n-grams from reaching back over the end of a document."""

    seed: int = 0
    """Seed of the multipliers of engram and qwen; the published models have 0 and 1234."""

    gate: GateKind = "context"
    """What decides how much of a token's rows e enters: none, W e; scalar, a learned number times
    W e; context, a number in (0, 1) from the agreement of e with the stream, times W e (Engram);
    glu, W (silu(G x) * e) (STEM); heads, for place values alone: each head's part of W e times a
    number in (0, 3) from the first 12 channels of the stream (nanochat's value embeddings).
    """

    convolution: int | None = None
    """Width of the causal depthwise convolution after the gate, whose dilation is the order; 0 for
    none. Default: 4 before a mixer, the only place that has one, 0 elsewhere.
    """

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("rule", self.rule, tuple(RULES)),
            ("place", self.place, get_args(Place)),
            ("token_map", self.token_map, get_args(TokenMapKind)),
            ("gate", self.gate, get_args(GateKind)),
        ):
            if value not in choices:
                raise ValueError(
                    f"model.ngram.{name} is {value!r}; expected one of {', '.join(choices)}"
                )
        self._check_numbers()
        rule = RULES[self.rule]
        fewest, most = rule.orders
        if self.length < fewest or (most is not None and self.length > most):
            fix = f"at least {fewest}" if most is None else f"{most}: leave it out"
            raise ValueError(
                f"model.ngram.order is {self.length}; that of rule {self.rule} is {fix}"
            )
        if rule.most_heads is not None and self.tables_of_order > rule.most_heads:
            raise ValueError(
                f"model.ngram.heads is {self.heads}; rule {self.rule} has {rule.most_heads}: leave "
                "it out"
            )
        if self.place == "embedding" and self.layers not in ((), (0,)):
            raise ValueError(
                f"model.ngram.layers is {list(self.layers)} and model.ngram.place embedding, of "
                "which there is one: set model.ngram.layers to [0]"
            )

    def _check_numbers(self) -> None:
        least = {"order": 1, "heads": 1, "rows": 2, "value_dim": 1, "token_ids": 1}
        least |= {"pad": 0, "eos": 0, "seed": 0, "convolution": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"model.ngram.{name} is {value!r}; it must be a whole number")
            if value < bound:
                raise ValueError(f"model.ngram.{name} is {value}; it must be at least {bound}")
            limit = _MOST.get(name)
            if limit is not None and int(value) > limit:
                raise ValueError(
                    f"model.ngram.{name} is {value}; the limit is {limit:,}: check the number"
                )
        if (self.gate == "heads") > (self.place == "values") or (
            self.place == "values" and self.gate in ("context", "glu")
        ):
            raise ValueError(
                f"model.ngram.gate is {self.gate} and model.ngram.place {self.place}: values take "
                "gate none, scalar or heads, other places none, scalar, context or glu"
            )
        if self.convolution and self.place != "mixer":
            raise ValueError(
                f"model.ngram.convolution is {self.convolution}, which place {self.place} does not "
                "have: leave it out, or set model.ngram.place=mixer"
            )
        if self.convolution == 1:
            raise ValueError(
                "model.ngram.convolution is 1; a width is at least 2 (Engram's is 4), or 0 for none"
            )
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"model.ngram.layers is {list(self.layers)}; name each layer once")

    @property
    def length(self) -> int:
        """Number of tokens of the longest n-gram: `order`, or the rule's."""
        return RULES[self.rule].order if self.order is None else self.order

    @property
    def tables_of_order(self) -> int:
        """Number of reads of each order: `heads`, or the rule's."""
        return RULES[self.rule].heads if self.heads is None else self.heads

    @property
    def kernel(self) -> int:
        """Width of the convolution: `convolution`, or that of the place."""
        default = 4 if self.place == "mixer" else 0
        return default if self.convolution is None else self.convolution

    @property
    def reads(self) -> int:
        """Number of rows that a token reads in a layer: of each order from 2, of each head."""
        return max(self.length - 1, 1) * self.tables_of_order

    @property
    def padding(self) -> int:
        """Id that stands before the first token: `pad`, or the rule's. ValueError if that is an
        unknown eos.
        """
        if self.pad is not None:
            return self.pad
        if RULES[self.rule].pad == "zero":
            return 0
        if self.eos is None:
            raise ValueError(
                f"model.ngram.pad of rule {self.rule} is eos, which is unknown: set model.ngram.eos"
            )
        return self.eos

    def width(self, dim: int) -> int:
        """Return the width of a row in a model `dim` wide. ValueError if reads do not divide it."""
        if self.value_dim is not None:
            return self.value_dim
        if dim % self.reads:
            raise ValueError(
                f"model.dim is {dim} and a token reads {self.reads} rows, which do not divide it: "
                "set model.ngram.value_dim"
            )
        return dim // self.reads

    def table_index(self, layer: int) -> int:
        """Return which table a layer reads, counted from 0."""
        return 0 if self.share else self.layers.index(layer)

    def sizes(self, token_ids: int, layer: int) -> tuple[int, ...]:
        """Return the rows of each read's part of the layer's table, by order, then head."""
        return RULES[self.rule].sizes(self, token_ids, self.table_index(layer))

    def slots(self, token_ids: int, layer: int) -> int:
        """Return the number of rows of the layer's table."""
        multiple = RULES[self.rule].multiple
        return -(-sum(self.sizes(token_ids, layer)) // multiple) * multiple

    def table_group(self, outputs: int, vocab_size: int) -> TableGroup:
        """Return the tables of all layers. outputs: width of what a layer adds; vocab_size: number
        of the model's tokens.
        """
        layers = self.layers[:1] if self.share else self.layers
        return TableGroup(
            section="ngram",
            slots=tuple(self.slots(self.token_ids or vocab_size, layer) for layer in layers),
            value_dim=self.width(outputs),
            reads=self.reads,
            lookups=len(self.layers),
            summed=False,
            size_key="model.ngram.rows",
        )

    def kept(self, dim: int, outputs: int, value_bytes: int) -> float:
        """Return the bytes that a layer keeps of a token for backward, without `reads_kept`.

        dim: of the model; outputs: width of what a layer adds; value_bytes: of an activation, 4, or
        2 under autocast.
        """
        a, width = value_bytes, self.reads * self.width(outputs)
        projected = self.gate in ("context", "glu") or width != outputs
        # The rows that a token reads, for the gradient of the projection.
        kept = float(a * width) if projected else 0.0
        if self.gate in ("scalar", "heads"):
            kept += a * outputs if projected else 4 * width
        elif self.gate == "context":
            # Of both norms input, scaled input and result, in fp32, the product, and numbers; under
            # autocast each projection casts the rows anew.
            kept += (a * width if a == 2 else 0) + (2 * 3 * 4 + a) * dim + 28
        elif self.gate == "glu":
            # The gate's input, its result, what silu makes of it, and the rows.
            kept += a * dim + 2 * a * width + 4 * width
        if self.gate in ("context", "glu") and self.place == "feedforward" and a == 4:
            kept -= 4 * dim  # the feedforward beside it keeps the same input
        if self.kernel:
            kept += 4 * 4 * dim + 4
        return kept

    @property
    def reads_kept(self) -> float:
        """Bytes that a layer keeps of a token's reads, apart from what the table's layout adds,
        even where the rest is computed again: number (int32) and weight of each row, and where its
        read begins (int64).
        """
        return 16.0 * self.reads
