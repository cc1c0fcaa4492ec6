"""Adaptive softmax (Grave et al. 2017): rare tokens share one place of the softmax each cluster,
and most tokens cost a short one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memshard.models.loss import IGNORE


class AdaptiveHead(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's own module as an output head. Tokens must be numbered from frequent to rare, as
    sentencepiece does.

    cutoffs: where clusters begin, ascending, below the size of the vocabulary. division: each
    cluster is as many times narrower than the one before it.
    """

    def __init__(self, dim: int, vocabulary: int, cutoffs: Sequence[int], division: float) -> None:
        if cutoffs[-1] >= vocabulary:
            raise ValueError(
                f"model.adaptive_cutoffs ends at {cutoffs[-1]}, and there are {vocabulary} "
                "tokens: use numbers below that"
            )
        if dim < division ** len(cutoffs):
            raise ValueError(
                f"model.adaptive_division is {division:g}: {len(cutoffs)} clusters, each narrower "
                f"by that, do not fit model.dim, {dim}"
            )
        super().__init__(dim, vocabulary, cutoffs, division)
        self.head.register_forward_hook(_exact)
        for cluster in self.tail:
            cluster.register_forward_hook(_exact)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, 0 where the target is IGNORE. x: [..., dim]; targets: [...] int64;
        returns [...].
        """
        rows, predicted = _exact(None, None, x.flatten(0, -2)), targets != IGNORE
        found = -self(rows, torch.where(predicted, targets, 0).flatten()).output.view(targets.shape)
        if torch.is_grad_enabled():
            # A cluster that no target is in has a gradient, too: ranks that exchange gradients wait
            # for each.
            found = found + 0 * sum(cluster(rows[:1]).sum() for cluster in self.tail)
        return torch.where(predicted, found, 0)

    def logits(self, x: Tensor) -> Tensor:
        """Log-probabilities of all tokens. x: [..., dim]; returns [..., vocabulary]."""
        return self.log_prob(_exact(None, None, x.flatten(0, -2))).unflatten(0, x.shape[:-1])


def _exact(layer: nn.Module | None, inputs: object, y: Tensor) -> Tensor:
    """y in fp32 where autocast makes it less: the softmax, and sums of log-probabilities, are for
    all of its digits.
    """
    return y.float() if torch.is_autocast_enabled(y.device.type) else y
