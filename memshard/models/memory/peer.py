"""Parameter-efficient expert retrieval (PEER; He 2024, arXiv 2407.04153): a memory whose slots are
experts of one neuron.
"""

from collections.abc import Sequence
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.config import ModelConfig
from memshard.models.memory.kinds import QueryNormKind, ScorePrecision, WeightingKind
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import ValueTable
from memshard.models.recompute.replay import Replay, run_once


class Peer(ProductKeyMemory):
    """Reads heads x topk of keys^2 experts, each gelu(down . x) times a value: y = sum_j weight_j
    gelu(down_j . x) values_j, with the exact GELU.

    Search and weights are those of `ProductKeyMemory`. down, values: tables to share with other
    layers; by default new ones of keys^2 rows of `dim`. device, dtype: of all weights. ValueError
    on sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        keys: int = 512,
        heads: int = 8,
        topk: int = 16,
        key_dim: int = 256,
        query_norm: QueryNormKind = "batch",
        values: ValueTable | None = None,
        down: ValueTable | None = None,
        weighting: WeightingKind = "softmax",
        score_precision: ScorePrecision = "fp32",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            keys,
            heads,
            topk,
            key_dim,
            query_norm=query_norm,
            values=values,
            weighting=weighting,
            score_precision=score_precision,
            device=device,
            dtype=dtype,
        )
        if down is not None and (down.slots, down.dim) != (keys**2, dim):
            raise ValueError(
                f"the shared table is {down.slots} x {down.dim}; this layer's experts take "
                f"{keys**2} x {dim}"
            )
        self.down = (
            down if down is not None else ValueTable(keys**2, dim, device=device, dtype=dtype)
        )
        self.down.keys = keys

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
            query_norm=settings.query_norm,
            values=tables[0],
            down=tables[1],
            weighting=settings.weighting,
            score_precision=settings.score_precision,
        )

    @property
    def tables(self) -> tuple[ValueTable, ...]:
        """The tables it reads, all at the same rows."""
        return self.values, self.down

    def read(self, tokens: Tensor, replay: Replay | None = None) -> Tensor:
        """Return the sum of the experts, [n, dim]. tokens: [n, dim]."""
        rows, weights = self.lookup(tokens, replay)
        # One neuron an expert: its hidden layer is a single number, the product of a
        # row and the token.
        hidden = F.gelu(
            run_once(
                replay,
                partial(self.down, rows, product=True),
                # fp32 at least: bf16 tokens with a bf16 table would ask for bf16 sums, which
                # kernels do not form.
                tokens.to(weights.dtype),
                extra_inputs=[self.down.autograd_handle],
            )
        )
        return run_once(
            replay,
            partial(self.values, rows),
            # An expert's output is its value times a number, so it is read like any value,
            # with that number as weight; the weight's gradient leads on to the search and to
            # the down table.
            weights * hidden,
            extra_inputs=[self.values.autograd_handle],
        )
