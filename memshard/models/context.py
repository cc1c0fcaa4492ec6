"""What a layer may know about the tokens it sees, besides their features."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from memshard.models.random import RandomKey


@dataclass(frozen=True)
class Context:
    """Facts about a batch of tokens, shared by all layers.

    positions: [batch, length] int64, place of each token in its sequence. documents: [batch,
    length] int64 or None; attention stays inside a document where given. padding: [batch, length]
    bool or None, True for real tokens. random: key of this pass's draws; None draws nothing
    (evaluation, or a model without dropout). part: the same facts of this rank's piece of the
    sequence, where ranks share its tokens; None where one sees them all. filler: how many tokens at
    the end only make such pieces equal. source: [batch, source length, dim] or None, an encoder's
    output, which a decoder reads besides; source_padding: [batch, source length] bool or None, True
    for its real tokens.
    """

    positions: Tensor
    documents: Tensor | None = None
    padding: Tensor | None = None
    random: RandomKey | None = None
    part: "Context | None" = None
    filler: int = 0
    source: Tensor | None = None
    source_padding: Tensor | None = None

    @property
    def own(self) -> "Context":
        """The facts of the tokens that this rank's residual stream holds; a mixer, which needs them
        all, takes the context itself.
        """
        return self.part or self

    def pieces(self, size: int) -> Iterator[tuple[slice, "Context"]]:
        """Stretches of at most `size` of the tokens that this rank holds, all for 0, and the
        context of each.
        """
        own = self.own
        length = own.positions.shape[1]
        for first in range(0, length, size or max(1, length)):
            piece = slice(first, first + (size or length))
            documents, padding = (
                None if field is None else field[:, piece] for field in (own.documents, own.padding)
            )
            yield piece, Context(own.positions[:, piece], documents, padding, self.random)

    @staticmethod
    def of(tokens: Tensor, start: int = 0) -> "Context":
        """The context of plain unpadded text. tokens: [batch, length], first at position
        `start`.
        """
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        return Context(positions=positions.expand(tokens.shape[0], -1))

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """[batch, 1, length, length] bool, True where a query (row) may see a key (column); None
        when merely causal.
        """
        if self.documents is None and self.padding is None:
            return None
        length = self.positions.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.positions.device).tril()
        mask = causal.expand(self.positions.shape[0], -1, -1)
        if self.documents is not None:
            mask = mask & (self.documents[:, :, None] == self.documents[:, None, :])
        if self.padding is not None:
            mask = mask & self.padding[:, None, :]
        # A padded query sees itself: a row of the mask without a key would give NaN.
        return (mask | torch.eye(length, dtype=torch.bool, device=mask.device))[:, None]

    @cached_property
    def document_sizes(self) -> list[list[int]]:
        """Of every row, the lengths of its stretches of one document, padding apart, in order.
        Waits for the device once a batch.
        """
        changes = torch.zeros_like(self.positions[:, 1:], dtype=torch.bool)
        for field in (self.documents, self.padding):
            if field is not None:
                changes = changes | (field[:, 1:] != field[:, :-1])
        length = self.positions.shape[1]
        ends = [
            [*(place + 1 for place, change in enumerate(row) if change), length]
            for row in changes.tolist()
        ]
        return [
            [end - begin for begin, end in zip([0, *row[:-1]], row, strict=True)] for row in ends
        ]
