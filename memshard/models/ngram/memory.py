"""A memory whose addresses are computed from the tokens: each token reads the rows of the n-grams
that end at it (Cheng et al. 2026, arXiv 2601.07372, "Engram"; Huang et al. 2025, arXiv 2501.16975,
"over-encoding").
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.context import Context
from memshard.models.layers.convolution import Convolutions, RecentRows
from memshard.models.layers.linear import Projection
from memshard.models.layers.norm import build_norm
from memshard.models.memory.layer import MemoryLayer
from memshard.models.memory.table import ValueTable
from memshard.models.ngram.build import build_addresses
from memshard.models.ngram.kinds import NgramConfig
from memshard.models.recompute.replay import Replay, run_once

_FIRST_SCALE = 0.1
_GATE_CHANNELS = 12


class NgramMemory(MemoryLayer):
    """Reads a row for each n-gram that ends at a token; e is what a token reads, side by side.

    settings: `token_ids` must be set. dim: width of input and output. layer: number of the block,
    which some rules mix into their hashes. values: a table to share with other layers; by default
    a new one. outputs: width of the output, by default dim; heads: that share it.

    With gate "none" the output is W e; "scalar" a W e with a learned number a, 0.1 at first;
    "context" sigmoid(s(k . q / sqrt(dim))) W e with k = norm(K e), q = norm(x) and s the signed
    root (Engram); "glu" W (silu(G x) * e) (STEM, arXiv 2601.10639); "heads" 3 sigmoid(g . x) times
    each head's part of W e, with g of 12 channels (nanochat's value embeddings). A convolution adds
    silu(conv(norm(y))) to the output y, by kernels that begin at 0. W is left out where e is as
    wide as the output and no gate is between.
    """

    section = "ngram"

    def __init__(
        self,
        settings: NgramConfig,
        dim: int,
        layer: int,
        values: ValueTable | None = None,
        output_scale: float = 1.0,
        outputs: int | None = None,
        heads: int = 1,
    ) -> None:
        super().__init__()
        assert settings.token_ids is not None
        self.dim, self.outputs, self.gating = dim, outputs or dim, settings.gate
        self.addresses = build_addresses(settings, settings.token_ids, layer)
        value_dim = settings.width(self.outputs)
        width = self.addresses.reads * value_dim
        self.values = values or ValueTable(self.addresses.slots, value_dim)
        self.scale: nn.Parameter | None = None
        self.output: Projection | None = None
        self.key: Projection | None = None
        self.gate: Projection | None = None
        if settings.gate == "scalar":
            self.scale = nn.Parameter(torch.empty(1))
        if settings.gate == "glu":
            self.gate = Projection(dim, width)
        if settings.gate == "context":
            self.key = Projection(width, dim)
            self.key_norm, self.query_norm = build_norm("rms", dim), build_norm("rms", dim)
        self.head_gate: Projection | None = None
        if settings.gate == "heads":
            self.head_gate = Projection(min(_GATE_CHANNELS, dim), heads)
        if settings.gate in ("context", "glu") or width != self.outputs:
            self.output = Projection(width, self.outputs, scale=output_scale)
        # Tokens that the hashed n-grams already reach are of no use to the kernel.
        self.convolutions = Convolutions(
            {"output": dim}, settings.kernel, self.addresses.order, zero=True
        )
        if self.convolutions:
            self.convolution_norm = build_norm("rms", dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the number of a scalar gate."""
        if self.scale is not None:
            self.scale.fill_(_FIRST_SCALE)

    @property
    def tables(self) -> tuple[ValueTable, ...]:
        """The table that the layer reads."""
        return (self.values,)

    def extra_repr(self) -> str:
        """Return the sizes that the parts do not show."""
        return f"{self.dim}, reads={self.addresses.reads}, gate={self.gating}"

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        recent: RecentRows | None = None,
        replay: Replay | None = None,
    ) -> tuple[Tensor, RecentRows | None]:
        """Return what the memory adds, [batch, length, outputs], and the convolution's advanced
        state where `recent` is given. x: [batch, length, dim].

        ctx: with the `window` of x's tokens; padding gives 0 and reads nothing. replay: that of a
        pass which backward repeats; the table is then read once.
        """
        self.prepare_tables()
        y = self._gated(x, self.read(x, ctx, replay))
        if not self.convolutions:
            return y, recent
        (mixed,), recent = self.convolutions([self.convolution_norm(_wide(y))], ctx, recent)
        return y + F.silu(mixed), recent

    def read(self, x: Tensor, ctx: Context, replay: Replay | None = None) -> Tensor:
        """Return what each token reads, [batch, length, reads * value_dim], in x's dtype."""
        assert ctx.window is not None
        rows = self.addresses(ctx.window)
        rows = rows.flatten(0, 1) if ctx.padding is None else rows[ctx.padding]
        # Called, as all parts are: hooks of others act on calls.
        read = run_once(
            replay, partial(self.values, rows), extra_inputs=[self.values.autograd_handle]
        ).flatten(1)
        read = read.to(x.dtype)
        if ctx.padding is None:
            return read.unflatten(0, x.shape[:2])
        return read.new_zeros(*x.shape[:2], read.shape[1]).index_put((ctx.padding,), read)

    def init_state(self, batch: int) -> RecentRows | None:
        """Return the convolution's state before a text begins; None without a convolution."""
        return self.convolutions.nothing_recent(batch)

    def _gated(self, x: Tensor, read: Tensor) -> Tensor:
        if self.gate is not None:
            read = F.silu(self.gate(x)) * read
        y: Tensor = read if self.output is None else self.output(read)
        if self.scale is not None:
            return y * self.scale.to(y.dtype)
        if self.head_gate is not None:
            gates = 3 * self.head_gate(x[..., :_GATE_CHANNELS]).sigmoid()
            return (y.unflatten(-1, (gates.shape[-1], -1)) * gates[..., None]).flatten(-2)
        if self.key is None:
            return y
        key, query = self.key_norm(_wide(self.key(read))), self.query_norm(_wide(x))
        score = (key * query).sum(-1, keepdim=True) * self.dim**-0.5
        return y * (score.sign() * score.abs().clamp(min=1e-6).sqrt()).sigmoid().to(y.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return x in fp32 at least: in half precision a sum of `dim` squares overflows."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
