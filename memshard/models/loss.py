"""Next-token cross-entropy."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Target of a position that predicts nothing."""


def token_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats of every position, 0 where the target is IGNORE.

    logits: [..., vocabulary]; targets: [...] int64. smoothing: share of the target that is spread over the whole vocabulary (Szegedy et
    al. 2016). Softmax in fp32 at least; returns [...].
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    rows = logits.flatten(0, -2)
    flat = F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)
    return flat.view(targets.shape)


def chunked_token_losses(logits: Callable[..., Tensor], *streams: Tensor, targets: Tensor, chunk: int, smoothing: float = 0.0) -> Tensor:
    """`token_losses` of logits(*streams), for `chunk` tokens of a sequence at a time: logits are never whole in memory.

    streams: [batch, length, ...], what `logits` takes token by token. Backward computes each piece again. Returns [batch, length].
    """

    def losses(*piece: Tensor) -> Tensor:
        return token_losses(logits(*piece[:-1]), piece[-1], smoothing)

    # split, and not slices: backward then joins the pieces' gradients once.
    pieces = zip(*(x.split(chunk, 1) for x in (*streams, targets)), strict=True)
    return torch.cat([checkpoint(losses, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces], 1)


def sparse_token_losses(logits: Callable[..., Tensor], *streams: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """`token_losses` of logits(*streams), computed only where there is something to predict: waits for the device.

    streams: [batch, length, ...], what `logits` takes token by token. Returns [batch, length].
    """
    predicted = targets != IGNORE
    found = token_losses(logits(*(x[predicted] for x in streams)), targets[predicted], smoothing)
    return found.new_zeros(targets.shape).masked_scatter(predicted, found)
