"""From the ids of n-grams to the rows that a token reads."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memshard.models.ngram.kinds import NgramConfig


class Addresses(nn.Module):
    """Gives a token the rows of its n-grams, by order, then head.

    All rules are the same arithmetic, in 64-bit integers that wrap around: a mixture of the last
    tokens' ids, each times a multiplier of the read, modulo a modulus of the read, plus where its
    part of the table begins. The numbers, int64 `multipliers` [orders, heads, order], `moduli` and
    `offsets` [orders, heads], are stored with the model, so that rows keep their meaning.

    settings, token_ids, layer: as for `build_addresses`. multipliers: for each order those of each
    head, or of all of them, for the token and those before it, as many as an n-gram has tokens.
    mix: what combines the products, XOR or a sum. spare: keep the last row of each part for tokens
    with none before them.
    """

    def __init__(
        self,
        settings: NgramConfig,
        token_ids: int,
        layer: int,
        multipliers: list[list[list[int]]],
        mix: Callable[[Any, Any], Any] = operator.xor,
        spare: bool = False,
    ) -> None:
        super().__init__()
        self.order, self.reads = settings.length, settings.reads
        self.slots, self.padding = settings.slots(token_ids, layer), settings.padding
        self.mix, self.spare = mix, spare
        self._sizes = settings.sizes(token_ids, layer)
        # A multiplier of 0 takes a token out of a mixture.
        self._multipliers = [
            [row + [0] * (self.order - len(row)) for row in rows] for rows in multipliers
        ]
        shape = (len(multipliers), settings.tables_of_order)
        for name, size in (
            ("multipliers", (shape[0], len(multipliers[0]), self.order)),
            ("moduli", shape),
            ("offsets", shape),
        ):
            self.register_buffer(name, torch.empty(size, dtype=torch.int64))
        self.multipliers: Tensor
        self.moduli: Tensor
        self.offsets: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the buffers, which a model made on the meta device loses."""
        sizes = torch.tensor(self._sizes, device="cpu")
        self.multipliers.copy_(torch.tensor(self._multipliers, device="cpu"))
        self.moduli.copy_((sizes - 1 if self.spare else sizes).view(self.moduli.shape))
        self.offsets.copy_((sizes.cumsum(0) - sizes).view(self.moduli.shape))

    def forward(self, window: Tensor) -> Tensor:
        """Return the rows [..., reads], int64 from 0 to slots - 1, of windows [..., order] int64:
        the ids of the token itself and of those 1, 2 ... places back, -1 where there is none.
        """
        rows: Tensor = self._rows(window, self.multipliers, self.moduli, self.offsets)
        return rows

    def numpy_rows(self, window: Any) -> Any:
        """Return what `forward` does, of and as a numpy array."""
        numbers = (self.multipliers, self.moduli, self.offsets)
        return self._rows(window, *(number.cpu().numpy() for number in numbers))

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"order={self.order}, reads={self.reads}, slots={self.slots}"

    def _rows(self, window: Any, multipliers: Any, moduli: Any, offsets: Any) -> Any:
        # torch's and numpy's operators agree, `%` rounding down included; a product with a truth
        # value is a choice in both.
        ids = (window + (window < 0) * (self.padding - window))[..., None, None]
        mixture = ids[..., 0, :, :] * multipliers[..., 0]
        for back in range(1, self.order):
            mixture = self.mix(mixture, ids[..., back, :, :] * multipliers[..., back])
        rows = mixture % moduli
        if self.spare:
            rows = rows + (window[..., 1, None, None] < 0) * (moduli - rows)
        return (rows + offsets).reshape(*window.shape[:-1], self.reads)
