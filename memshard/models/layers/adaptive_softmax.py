"""Adaptive softmax (Grave et al. 2017): clusters of rare tokens have one entry each in a short
softmax, which is all that most tokens cost.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memshard.models.loss import IGNORE


class AdaptiveHead(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's module as an output head. Tokens must be numbered from frequent to rare, as
    sentencepiece does.

    cutoffs: first token of each cluster, ascending. division: how many times narrower the vectors
    of a cluster are than those of the one before. ValueError on sizes that do not fit.
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
        """Return the cross-entropy in nats, [...], 0 where the target is IGNORE. x: [..., dim];
        targets: [...] int64.
        """
        # The module wants valid targets everywhere; what token 0 costs there is
        # replaced by 0 below.
        rows, predicted = _exact(None, None, x.flatten(0, -2)), targets != IGNORE
        losses = -self(rows, torch.where(predicted, targets, 0).flatten()).output
        losses = losses.view(targets.shape)
        if torch.is_grad_enabled():
            # Clusters without a target need a gradient as well, of 0: ranks that sum gradients wait
            # for every parameter.
            losses = losses + 0 * sum(cluster(rows[:1]).sum() for cluster in self.tail)
        return torch.where(predicted, losses, 0)

    def logits(self, x: Tensor) -> Tensor:
        """Return the log-probabilities of all tokens, [..., vocabulary]. x: [..., dim]."""
        return self.log_prob(_exact(None, None, x.flatten(0, -2))).unflatten(0, x.shape[:-1])


def _exact(layer: nn.Module | None, inputs: object, y: Tensor) -> Tensor:
    """Return y in fp32 under autocast: softmax and sums of log-probabilities need the digits."""
    return y.float() if torch.is_autocast_enabled(y.device.type) else y
