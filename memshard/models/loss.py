"""Next-token cross-entropy."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Target of a position that predicts nothing. Also in data_pipeline/stream/batch.py, since neither
package may import the other.
"""


def token_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats of every position, 0 where the target is IGNORE.

    logits: [..., vocabulary]; targets: [...] int64. smoothing: share of the target that is spread
    over the whole vocabulary (Szegedy et al. 2016). Softmax in fp32 at least; returns [...].
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    rows = logits.flatten(0, -2)
    flat = F.cross_entropy(
        rows, targets.flatten(), ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )
    return flat.view(targets.shape)


def chunked(losses: Callable[..., Tensor], *inputs: Tensor, chunk: int) -> Tensor:
    """losses(*inputs), computed for `chunk` tokens of a sequence at a time: what lies between is
    never whole in memory.

    inputs: [batch, length, ...], which `losses` takes token by token. Backward computes each piece
    again. Returns [batch, length].
    """
    # split, and not slices: backward then joins the pieces' gradients once.
    pieces = zip(*(x.split(chunk, 1) for x in inputs), strict=True)
    return torch.cat(
        [
            checkpoint(losses, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in pieces
        ],
        1,
    )
