"""Next-token cross-entropy."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Target of a position that predicts nothing."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every position, 0 where the target is IGNORE.

    logits: [..., vocabulary]; targets: [...] int64. Softmax in fp32 at least; returns [...].
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view(targets.shape)


def chunked_token_losses(logits: Callable[..., Tensor], *streams: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """`token_losses` of logits(*streams), for `chunk` tokens of a sequence at a time: logits are never whole in memory.

    streams: [batch, length, ...], what `logits` takes token by token. Backward computes each piece again. Returns [batch, length].
    """

    def losses(*piece: Tensor) -> Tensor:
        return token_losses(logits(*piece[:-1]), piece[-1])

    # split, and not slices: backward then joins the pieces' gradients once.
    pieces = zip(*(x.split(chunk, 1) for x in (*streams, targets)), strict=True)
    return torch.cat([checkpoint(losses, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces], 1)
