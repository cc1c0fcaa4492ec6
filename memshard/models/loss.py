"""Next-token cross-entropy."""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of a position that predicts nothing."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every position, 0 where the target is IGNORE.

    logits: [..., vocabulary]; targets: [...] int64. Softmax in fp32 at least; returns [...].
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view(targets.shape)
