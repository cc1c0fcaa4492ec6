"""The tokens that n-grams are made of: each token with those before it, and what a state keeps."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memshard.models.context import Context
from memshard.models.layers.convolution import RecentRows, nothing_recent
from memshard.models.ngram.kinds import NgramConfig
from memshard.models.ngram.window import document_begins, windows


class TokenWindow(nn.Module):
    """Gives each token the ids of the n-gram that ends at it.

    settings: `token_ids` must be set. vocab_size: number of the model's tokens.
    """

    def __init__(self, settings: NgramConfig, vocab_size: int) -> None:
        super().__init__()
        self.order, self.needed = settings.length, settings.length - 1
        self.eos, self.resets = settings.eos, settings.reset
        self.token_map: Tensor | None
        """[vocab_size] int64, the id of each token in n-grams; None where they are the same. It is
        stored with the model, since it comes from the tokenizer.
        """
        mapped = settings.token_map != "none"
        self.register_buffer(
            "token_map", torch.empty(vocab_size, dtype=torch.int64) if mapped else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let each token stay itself, until `set_token_map`."""
        if self.token_map is not None:
            torch.arange(len(self.token_map), out=self.token_map)

    def set_token_map(self, ids: Sequence[int]) -> None:
        """Set the id of each token in n-grams. ValueError where it does not fit the settings."""
        if self.token_map is None or len(ids) != len(self.token_map):
            raise ValueError(
                f"the map has {len(ids)} tokens; set model.ngram.token_map and model.vocab_size "
                "to match it"
            )
        self.token_map.copy_(torch.tensor(ids))

    def forward(
        self, tokens: Tensor, ctx: Context, recent: RecentRows | None = None
    ) -> tuple[Tensor, RecentRows | None]:
        """Return the window of each token, [batch, length, order] int64: its id and those of the
        tokens before it, nearest first, -1 where there is none; and the advanced state where
        `recent` is given.

        Padding, other documents and, where the settings have an end of documents, what is before
        it, are not there. recent: from `init_state`; its rows are ids plus 1, and 0 where there is
        none.
        """
        # 1 is added so that 0, with which states begin and to which `reset` sets them, is no token.
        ids, documents = tokens + 1, ctx.documents
        if ctx.padding is not None:
            ids = ids.masked_fill(~ctx.padding, 0)
        if recent is None:
            return self._windows(ids, documents), None
        if documents is None:
            documents = recent.documents[:, -1:].expand(ids.shape)
        before = slice(recent.rows.shape[1] - self.needed, None)
        joined = torch.cat((recent.rows[:, before, 0], ids), 1)
        known = torch.cat((recent.documents[:, before], documents), 1)
        return (
            self._windows(joined, known)[:, self.needed :],
            recent.followed_by(ids[..., None], documents),
        )

    def init_state(self, batch: int, device: torch.device) -> RecentRows:
        """Return the state before a text begins."""
        like = torch.zeros((), dtype=torch.int64, device=device)
        return nothing_recent(like, batch, 1, self.needed)

    @staticmethod
    def reorder(state: RecentRows, rows: Tensor) -> RecentRows:
        """Return the state of other rows, as a mixer's `reorder` does."""
        return state.reorder(rows)

    @staticmethod
    def rollback(state: RecentRows, tokens: int) -> RecentRows:
        """Return the state before its last tokens, as a mixer's `rollback` does."""
        return state.rollback(tokens)

    @staticmethod
    def reset(state: RecentRows, rows: Tensor) -> RecentRows:
        """Forget everything in the given rows, as a mixer's `reset` does."""
        return state.reset(rows)

    def _windows(self, ids: Tensor, documents: Tensor | None) -> Tensor:
        tokens = ids - 1
        eos, documents = (self.eos, documents) if self.resets else (None, None)
        begins = document_begins(tokens, eos, documents, ids > 0)
        if self.token_map is not None:
            tokens = torch.where(ids > 0, self.token_map[tokens.clamp(min=0)], -1)
        return windows(tokens, self.order, begins)
