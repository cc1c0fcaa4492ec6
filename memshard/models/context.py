"""The context of a batch: what layers may know about tokens besides their features."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from memshard.models.random import RandomKey


@dataclass(frozen=True)
class Context:
    """Facts about a batch of tokens, shared by all layers.

    positions: [batch, length] int64, place of each token in its sequence. documents: [batch,
    length] int64, the document of each token; attention stays inside a document. padding: [batch,
    length] bool, True for real tokens. random: key of this pass's draws; None draws nothing
    (evaluation, or a model without dropout). source: [batch, source length, dim], the encoder's
    output that a decoder reads; source_padding: [batch, source length] bool, True
    for its real tokens. predicted: [n] int64, the places in the flat batch whose losses are wanted;
    None leaves it to the targets. window: [batch, length, n] int64, the tokens of the n-gram that
    ends at each token (ngram/recent_tokens.py), for memories that are addressed by them.
    values: [batch, length, channels of all heads' values], what such a memory adds to the values of
    the mixer that is called.

    Where ranks share the tokens of a sequence, mixers see all of them and other layers only this
    rank's: local_part has the facts of those. padding_tokens: how many tokens at the end of the
    sequence only make the ranks' segments equally long.
    """

    positions: Tensor
    documents: Tensor | None = None
    padding: Tensor | None = None
    random: RandomKey | None = None
    local_part: "Context | None" = None
    padding_tokens: int = 0
    source: Tensor | None = None
    source_padding: Tensor | None = None
    predicted: Tensor | None = None
    _mask: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    window: Tensor | None = None
    values: Tensor | None = None

    @property
    def local(self) -> "Context":
        """The facts of the tokens in this rank's residual stream; by default of all."""
        return self.local_part or self

    def split(self, size: int) -> Iterator[tuple[slice, "Context"]]:
        """Yield spans of at most `size` local tokens (0: all at once), each with its context."""
        local = self.local
        length = local.positions.shape[1]
        # An empty sequence would be a step of 0, which range refuses.
        for first in range(0, length, size or max(1, length)):
            span = slice(first, first + (size or length))
            documents, padding, window = (
                None if field is None else field[:, span]
                for field in (local.documents, local.padding, local.window)
            )
            yield (
                span,
                Context(local.positions[:, span], documents, padding, self.random, window=window),
            )

    @staticmethod
    def of(tokens: Tensor, start: int = 0) -> "Context":
        """Return the context of plain unpadded text. tokens: [batch, length]; start: position of
        the first one.
        """
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        return Context(positions=positions.expand(tokens.shape[0], -1))

    @property
    def attention_mask(self) -> Tensor | None:
        """Mask, [batch, 1, length, length] bool, True where a query (row) may see a key (column);
        None when merely causal.
        """
        if self.documents is None and self.padding is None:
            return None
        # Computed once and used by all layers. Not a cached_property, whose lock in Python 3.11
        # torch.compile cannot take.
        if self._mask is None:
            object.__setattr__(self, "_mask", self._made_mask())
        return self._mask

    def _made_mask(self) -> Tensor:
        length = self.positions.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.positions.device).tril()
        mask = causal.expand(self.positions.shape[0], -1, -1)
        if self.documents is not None:
            mask = mask & (self.documents[:, :, None] == self.documents[:, None, :])
        if self.padding is not None:
            # Only keys: what a padded query returns, the loss ignores.
            mask = mask & self.padding[:, None, :]
        # A padded query sees itself: a row of the mask without a key would give NaN.
        return (mask | torch.eye(length, dtype=torch.bool, device=mask.device))[:, None]

    @cached_property
    def document_sizes(self) -> list[list[int]]:
        """For every row, the lengths of its runs of one document, in order; padding counts as a
        document. Waits for the device once a batch.
        """
        changes = torch.zeros_like(self.positions[:, 1:], dtype=torch.bool)
        for numbers in (self.documents, self.padding):
            if numbers is not None:
                changes = changes | (numbers[:, 1:] != numbers[:, :-1])
        length = self.positions.shape[1]
        ends = [
            [*(place + 1 for place, change in enumerate(row) if change), length]
            for row in changes.tolist()
        ]
        return [
            [end - begin for begin, end in zip([0, *row[:-1]], row, strict=True)] for row in ends
        ]
