"""Count which sub-keys a memory's queries select, and push them to select more evenly."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memshard.models.once import Saved, differentiable_once

_MOMENTUM = 0.1


class KeyUse:
    """Watch a memory's search while it trains; attach it as `memory.key_use`.

    share: [heads, 2, keys] fp32, each sub-key's share of the reads of its head and half, averaged
    over about the last 10 steps; last_read: the last step that read it, 0 if none. Both count the
    reads of all ranks: reduce sums a tensor over them. balance: weight of the gradient of L = keys
    * sum_i share_i softmax(scores)_i, summed over tokens, heads and both halves, the load-balance
    loss of mixtures of experts (Fedus et al. 2021, equation 4); 0 is none. The shares are those of
    earlier steps, so L is a sum over tokens, whatever ranks and micro-batches they are in. It keeps
    all scores for backward, 8 heads keys bytes a token.
    """

    def __init__(
        self,
        heads: int,
        keys: int,
        device: torch.device | str = "cpu",
        reduce: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        # Even at first, which gives L no gradient: until reads are counted, nothing is pushed.
        self.share = torch.full((heads, 2, keys), 1 / keys, device=device)
        self.last_read = torch.zeros_like(self.share)
        self.balance = 0.0
        self.reduce = reduce
        self._reads = torch.zeros_like(self.share, dtype=torch.int64)

    def balanced(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores, [tokens, heads, keys] each; backward adds the gradient of L."""
        if not self.balance:
            return first, second
        return (
            _Balanced.apply(first, self.share[:, 0], self.balance),
            _Balanced.apply(second, self.share[:, 1], self.balance),
        )

    def count_reads(self, i1: Tensor, i2: Tensor) -> None:
        """Count the sub-keys of the slots that are read. i1, i2: [tokens, heads, topk]."""
        for half, selected in enumerate((i1, i2)):
            # [tokens, heads, topk] to [heads, tokens * topk]: a sub-key is counted in its own head.
            by_head = selected.transpose(0, 1).flatten(1)
            self._reads[:, half].scatter_add_(1, by_head, torch.ones_like(by_head))

    def commit(self, step: int) -> None:
        """Count the reads since the last commit as those of a step; all ranks call it."""
        reads = self.reduce(self._reads)
        totals = reads.sum(-1, keepdim=True)
        # After a step without reads (a batch of padding) the shares stay; reads / 1 would draw
        # them to 0.
        momentum = totals.any().to(self.share.dtype) * _MOMENTUM
        self.share.lerp_((reads / totals.clamp(min=1)).to(self.share.dtype), momentum)
        self.last_read.masked_fill_(reads > 0, step)
        self._reads.zero_()

    def discard(self) -> None:
        """Forget the reads since the last commit: the step was skipped."""
        self._reads.zero_()


class _Balanced(torch.autograd.Function):
    """Return the scores; backward adds the gradient of L.

    No loss has to be carried along, so recomputed and reversible layers need nothing special.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, share: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        # A copy of the shares: the step's commit changes them in place.
        ctx.save_for_backward(scores, share * scores.shape[-1])
        return scores.view_as(scores)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, gradient: Tensor) -> tuple[Tensor, None, None]:
        scores, load = saved
        # L = sum_i load_i p_i with p = softmax(s), so dL/ds_j = p_j (load_j - sum_i load_i p_i).
        chosen = scores.softmax(-1)
        return (
            gradient + ctx.weight * chosen * (load - (chosen * load).sum(-1, keepdim=True)),
            None,
            None,
        )
