"""The contract of all mixers: `mixer(x, ctx, state) -> (y, state)`.

Without a state a mixer sees the tokens of x alone; with one, x continues what the state has seen.
Training, cached decoding, beam search and carried text all go through this one call.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memshard.models.context import Context
from memshard.models.fast_weights.segments import Neighbours
from memshard.models.mixers.kinds import names


class MixerState(Protocol):
    """The memory of a mixer between calls. Only the mixer knows more of it than this."""

    @property
    def length(self) -> int:
        """Number of tokens seen."""


class Mixer(nn.Module):
    """One layer's exchange of information between tokens, by heads.

    A subclass in the registry also has a classmethod `from_config(config, layer, output_scale)`,
    which makes the layer of a `ModelConfig`; output_scale is that of `layers.linear.Projection` for
    its output matrix.
    """

    column_parallel: tuple[str, ...] = ("query", "key", "value")
    """Names of the projections whose outputs belong to heads."""
    row_parallel: tuple[str, ...] = ("output",)
    """Names of the projections whose inputs belong to heads."""

    one_graph = True
    """Whether torch.compile takes `forward` without a break, so that it takes a block whole."""

    heads: int
    """Heads computed here: all, or this rank's where ranks share them (set by `parallel/`)."""
    first_head = 0
    """Number of the first of them in the whole layer (set by `parallel/`)."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> tuple[Tensor, Any]:
        """Return [batch, length, dim], as x, and, where a state was given, the advanced one."""
        raise NotImplementedError

    def init_state(self, batch: int, capacity: int) -> Any:
        """Return an empty state for `batch` rows of at most `capacity` tokens, on the layer's
        device in its dtype. ValueError where there is no decoding.
        """
        raise NotImplementedError

    def reorder(self, state: Any, rows: Tensor) -> Any:
        """Return the state whose row i is row rows[i] of this one. rows: [new batch] int64."""
        raise NotImplementedError

    def rollback(self, state: Any, tokens: int) -> Any:
        """Return the state before its last `tokens` tokens. ValueError where they are gone."""
        raise NotImplementedError

    def reset(self, state: Any, rows: Tensor) -> Any:
        """Forget everything in the given rows (a document ended there). rows: [batch] bool."""
        raise NotImplementedError

    def share_sequence(self, neighbours: Neighbours) -> None:
        """Expect x to be this rank's segment of a sequence from now on, and exchange states with
        the ranks that have the others. ValueError for kinds that cannot.
        """
        raise ValueError(
            "parallel.share is sequence, which is for mixers "
            f"{names(lambda kind: kind.sequence_bytes)}: set model.mixer.kind, or leave it out"
        )

    @property
    def applies_norm(self) -> bool:
        """True if `forward` without a state takes the block's norm as `norm` and applies it itself,
        a part of the work at a time.
        """
        return False

    def kernel_choice(self, device: torch.device, dtype: torch.dtype) -> tuple[str, str] | None:
        """Return what is computed by one of several kernels, and by which and why, for the opening
        screen; None if there is no choice.
        """
        return None
