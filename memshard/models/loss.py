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
    """Return the cross-entropy in nats of every position, [...], 0 where the target is IGNORE.

    logits: [..., vocabulary]; targets: [...] int64. smoothing: share of the target that is spread
    over the whole vocabulary (Szegedy et al. 2016). The softmax is in fp32 at least.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    rows = logits.flatten(0, -2)
    flat = F.cross_entropy(
        rows, targets.flatten(), ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )
    return flat.view(targets.shape)


def places_of(predicted: Tensor) -> Tensor:
    """Return where a mask is set, [n] int64, as places in the mask laid out flat."""
    return predicted.flatten().nonzero().squeeze(1)


def chunked(losses: Callable[..., Tensor], *inputs: Tensor, chunk: int) -> Tensor:
    """Return losses(*inputs), [batch, length], computed for `chunk` tokens of a sequence at a time,
    so that intermediate results (logits) are never in memory for all of them.

    inputs: [batch, length, ...] each; `losses` must treat tokens independently. Backward recomputes
    each chunk.
    """
    # split, not slices: backward of a split joins the chunks' gradients once, while each slice
    # would allocate a gradient of the whole input.
    chunks = zip(*(x.split(chunk, 1) for x in inputs), strict=True)
    return torch.cat(
        [
            checkpoint(losses, *tensors, use_reentrant=False, preserve_rng_state=False)
            for tensors in chunks
        ],
        1,
    )
