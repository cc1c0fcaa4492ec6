"""Product-key memory (Lample et al. 2019) and its gated form Memory+ (Berges et al. 2024)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models import compat
from memshard.models.config import ModelConfig
from memshard.models.kernels.backend import lookup_for
from memshard.models.layers.linear import cast_once
from memshard.models.memory.check_input import check_dtype, check_padding, kind_of
from memshard.models.memory.key_use import KeyUse
from memshard.models.memory.kinds import (
    QueryNormKind,
    ScorePrecision,
    WeightingKind,
    check_product_keys,
    check_sizes,
    check_value_dim,
)
from memshard.models.memory.layer import MemoryLayer
from memshard.models.memory.look_up import look_up
from memshard.models.memory.product_topk import product_topk
from memshard.models.memory.query_norm import QueryNorm
from memshard.models.memory.table import ValueTable
from memshard.models.recompute.replay import Replay, run_once


class ProductKeyMemory(MemoryLayer):
    """A position-wise layer that reads heads x topk of keys^2 values.

    Each head's query, split in two halves, scores two sets of `keys` sub-keys; the slots (i1, i2)
    with the highest summed scores are read, weighted, and summed over heads.

    dim: width of input and output.
    keys: number of sub-keys per half; the table has keys^2 rows.
    heads: number of queries of a token, whose readings are summed.
    topk: number of rows that each head reads; at most keys.
    key_dim: width of a query, even.
    value_dim: width of a value, by default dim; another width needs `gate`.
    query_norm: how queries are normalised: "batch" (over the tokens of a batch; the paper's best),
        "lagged" (by statistics of earlier batches: causal), "layer", "layer-half" (each half by
        itself), "rms" or "none".
    gate: make the output W2(reading * silu(W1 x)), as Memory+ does.
    values: a table to share with other layers; by default a new one.
    weighting: weights of the rows read, from their scores: "softmax" over the topk, or "sigmoid" or
        "relu" of each score, divided by topk.
    score_precision: arithmetic of scores where a GPU's kernels search: "fp32", or on tensor cores
        "tf32" or "bf16x3" (three bf16 products); docs/memory.md has their errors. Elsewhere fp32.
    device, dtype: of all weights, as in torch's layers; running statistics of queries are fp32 at
        least.

    ValueError on sizes and choices that do not fit.
    """

    def __init__(
        self,
        dim: int,
        keys: int = 512,
        heads: int = 4,
        topk: int = 32,
        key_dim: int = 256,
        value_dim: int | None = None,
        query_norm: QueryNormKind = "batch",
        gate: bool = False,
        values: ValueTable | None = None,
        weighting: WeightingKind = "softmax",
        score_precision: ScorePrecision = "fp32",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim)
        check_product_keys(keys, heads, topk, key_dim, weighting, score_precision)
        check_value_dim(value_dim, dim, gate)
        value_dim = dim if value_dim is None else value_dim
        check_dtype(dtype)
        if not isinstance(values, ValueTable | None):
            raise TypeError(f"values is {kind_of(values)}; it must be a ValueTable or None")
        if values is not None and (values.slots, values.dim) != (keys**2, value_dim):
            raise ValueError(
                f"the shared table is {values.slots} x {values.dim}; this layer reads {keys**2} x "
                f"{value_dim}"
            )
        self.dim, self.heads, self.topk, self.weighting = dim, heads, topk, weighting
        self.score_precision = score_precision
        self.query = nn.Linear(dim, heads * key_dim, device=device, dtype=dtype)
        self.query_norm = QueryNorm(query_norm, heads, key_dim, device=device, dtype=dtype)
        self.sub_keys = SubKeys(heads, keys, key_dim // 2, device=device, dtype=dtype)
        self.values = (
            values
            if values is not None
            else ValueTable(keys**2, value_dim, device=device, dtype=dtype)
        )
        self.values.keys = keys
        self.key_use: KeyUse | None = None
        """Watches the search in training, if set."""
        self.gate: nn.Linear | None = None
        self.output: nn.Linear | None = None
        if gate:
            self.gate = nn.Linear(dim, value_dim, bias=False, device=device, dtype=dtype)
            self.output = nn.Linear(value_dim, dim, bias=False, device=device, dtype=dtype)

    @classmethod
    def from_config(cls, config: ModelConfig, tables: Sequence[ValueTable]) -> Self:
        """Return the memory of a layer. tables: those it reads, in the order of `tables`."""
        settings = config.memory
        return cls(
            config.dim,
            keys=settings.keys,
            heads=settings.heads,
            topk=settings.topk,
            key_dim=settings.key_dim,
            value_dim=settings.value_dim,
            query_norm=settings.query_norm,
            gate=settings.gate,
            values=tables[0],
            weighting=settings.weighting,
            score_precision=settings.score_precision,
        )

    @property
    def tables(self) -> tuple[ValueTable, ...]:
        """The tables that the layer reads, all at the same rows."""
        return (self.values,)

    def forward(
        self, x: Tensor, padding: Tensor | None = None, replay: Replay | None = None
    ) -> Tensor:
        """Return the layer's output, of x's shape [..., dim]. ValueError for another width.

        padding: [...] bool, True for real tokens; padded positions give 0 and read nothing.

        replay: that of a pass which backward repeats; tables are then read, and statistics taken,
        only once.
        """
        if torch.jit.is_tracing():
            raise NotImplementedError(
                f"{type(self).__name__} is not recorded by torch.jit.trace, nor by the ONNX "
                "exporter that uses it: torch.export.export(model, inputs)"
            )
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim()):
            raise TypeError(
                f"the input of {type(self).__name__} is a tensor [..., {self.dim}] of floating "
                f"point numbers, not {kind_of(x)}"
            )
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"the input is {x.shape[-1]} wide, this {type(self).__name__} was made for "
                f"{self.dim}: dim is the model's width"
            )
        if padding is not None:
            check_padding(padding, x)
            # Not self(...): hooks on the layer act once.
            real = self.forward(x[padding], replay=replay)
            return real.new_zeros(x.shape).index_put((padding,), real)
        tokens = x.reshape(-1, x.shape[-1])
        if self.gate is not None:
            tokens = cast_once(tokens)
        self.prepare_tables()
        y = self.read(tokens, replay).to(x.dtype)
        if self.output is not None:
            # Imported memories may have an output projection alone.
            y = self.output(y if self.gate is None else y * F.silu(self.gate(tokens)))
        # As nn.Linear does: a tensor of its own to autograd, not a view, of which FSDP2 warns.
        shaped: Tensor = torch.ops.aten._unsafe_view(y, x.shape)
        return shaped

    def extra_repr(self) -> str:
        """Return the sizes that the parts do not show."""
        return f"{self.dim}, heads={self.heads}, topk={self.topk}, weighting={self.weighting}"

    def read(self, tokens: Tensor, replay: Replay | None = None) -> Tensor:
        """Return the weighted sum of the values read, [n, value_dim]. tokens: [n, dim]."""
        rows, weights = self.lookup(tokens, replay)
        return run_once(
            replay,
            # Called, as all parts are: hooks of others, such as accelerate's that bring offloaded
            # weights, act on calls.
            partial(self.values, rows),
            weights,
            extra_inputs=[self.values.autograd_handle],
        )

    def lookup(self, tokens: Tensor, replay: Replay | None = None) -> tuple[Tensor, Tensor]:
        """Return the rows to read, int64, and their weights, fp32 at least: [n, heads * topk] each.

        tokens: [n, dim].
        """
        weight = self.query.weight
        if (
            # Not of what adapters and quantization put in its place: those cast.
            type(self.query) is nn.Linear
            and tokens.dtype != weight.dtype
            and not torch.is_autocast_enabled(tokens.device.type)
        ):
            raise TypeError(
                f"the memory's input is {tokens.dtype} and its weights are {weight.dtype}: cast "
                f"one of them, memory.to({tokens.dtype}) or x.to({weight.dtype}), or compute "
                "under torch.autocast"
            )
        # [tokens, heads, key_dim]
        z = self.query(tokens).unflatten(-1, (self.heads, -1))
        if not torch.compiler.is_compiling() and compat.in_transform(z):
            raise NotImplementedError(
                f"{type(self).__name__} does not run under torch.func (vmap, grad, jvp): it takes "
                "any leading dimensions at once, and torch.autograd.grad its gradients"
            )
        # Scores in half precision would tie by the dozen; they cost heads * keys * key_dim
        # multiplications a token.
        with compat.without_autocast(tokens.device.type):
            rows, weights = self.sub_keys(
                self.query_norm(z, replay), partial(self._search, replay=replay)
            )
        return rows.flatten(1), weights.flatten(1)

    def _search(
        self, queries: Tensor, sub_keys: Tensor, replay: Replay | None
    ) -> tuple[Tensor, Tensor]:
        """Return rows and weights, [tokens, heads, topk] each.

        queries: [tokens, heads, key_dim], fp32 at least; sub_keys: [heads, 2, keys, half].
        """
        keys, watch = sub_keys.shape[2], self.key_use if self.training else None
        lookup = lookup_for(queries, sub_keys, self.topk, self.score_precision)
        # The gradient of balance goes to all scores, so these have to be there.
        if lookup is not None and not (watch and watch.balance):
            rows, weights = look_up(
                lookup, queries, sub_keys, self.topk, self.weighting, self.score_precision, replay
            )
            i1, i2 = slot_sub_keys(rows, keys) if watch else (rows, rows)
        else:
            first, second = half_scores(queries, sub_keys)
            if watch is not None:
                first, second = watch.balanced(first, second)
            scores, i1, i2 = product_topk(first, second, self.topk, replay)
            weights = weigh(scores, self.weighting)
            rows = slot_rows(i1, i2, keys)
        # The repetition in backward would count each read twice.
        if watch is not None and not (replay and replay.repeating):
            watch.count_reads(i1, i2)
        return rows, weights


def weigh(scores: Tensor, weighting: str) -> Tensor:
    """Return the weights of reads from their scores, both [..., topk].

    weighting: softmax, or sigmoid or relu of each score independently, divided by topk so that they
    add up to about as much. Without competition a slot's weight does not fall because another's
    rises (Csordas et al. 2023, arXiv 2310.10837, report relu to be better in large tables).
    """
    if weighting == "softmax":
        return scores.softmax(-1)
    return (scores.sigmoid() if weighting == "sigmoid" else scores.relu()) / scores.shape[-1]


class SubKeys(nn.Module):
    """Two codebooks of sub-keys for each head: weight [heads, 2, keys, half].

    They are drawn from U(-1/sqrt(half), 1/sqrt(half)).
    """

    def __init__(
        self,
        heads: int,
        keys: int,
        half: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, 2, keys, half, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the sub-keys."""
        # Scores of queries of variance 1 then have variance half * bound^2 / 3 = 1 / 3
        # at any width.
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """Return the sizes."""
        heads, _, keys, half = self.weight.shape
        return f"heads={heads}, keys=2 x {keys}, half={half}"

    def forward(
        self, queries: Tensor, search: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return search(queries, weight), inside a call, on which hooks of others act."""
        return search(queries, self.weight)


def half_scores(queries: Tensor, sub_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of both halves, [tokens, heads, keys] each.

    queries: [tokens, heads, key_dim], fp32 at least; sub_keys: [heads, 2, keys, half].
    """
    halves, keys = (
        queries.unflatten(-1, (2, -1)).unbind(-2),
        # In the queries' dtype, fp32 at least: see `lookup`.
        sub_keys.to(queries.dtype).unbind(1),
    )
    # Tokens t, heads h, sub-keys n, channels d of a half. One einsum over both halves would
    # have to stack the gradients of their scores, [tokens, heads, 2, keys], in backward.
    first, second = (torch.einsum("thd,hnd->thn", *pair) for pair in zip(halves, keys, strict=True))
    return first, second


def slot_rows(i1: Tensor, i2: Tensor, keys: int) -> Tensor:
    """Return the row in which the value of slot (i1, i2) is stored.

    Rows are ordered by diagonal (i1 + i2) mod keys, then by i1. With 4 keys, as i1,i2:

        row       0   1   2   3     4   5   6   7     8   9  10  11    12  13  14  15
        slot     0,0 1,3 2,2 3,1   0,1 1,0 2,3 3,2   0,2 1,1 2,0 3,3   0,3 1,2 2,1 3,0

    Why: some sub-keys are read far more than others. In the plain order i1 * keys + i2, a rank that
    stores a contiguous range of rows has all slots of a few i1, and a hot one floods it. On a
    diagonal every i1 and every i2 occurs once, so each range of `keys` rows has one slot of every
    sub-key of both halves: reads are balanced over any number of ranks, and because the order does
    not depend on that number, a checkpoint loads on another one by cutting rows elsewhere.
    """
    return (i1 + i2) % keys * keys + i1


def row_slots(rows: Tensor, keys: int) -> Tensor:
    """Return the slot number i1 * keys + i2 stored in each row; the inverse of `slot_rows`."""
    i1, i2 = slot_sub_keys(rows, keys)
    return i1 * keys + i2


def slot_sub_keys(rows: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Return the sub-keys i1 and i2 of the slot stored in each row."""
    i1, diagonal = rows % keys, rows // keys
    return i1, (diagonal - i1) % keys
