"""Sequences cut into chunks, and how writes fade inside a chunk.

B batch, H heads, L length, N chunks, C tokens a chunk, D key features, M value features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Fading:
    """Factors between 0 and 1 that are left of earlier writes; shapes broadcast over heads.

    pair: [B, H, N, C, C], of token j's write when token i reads; 0 for j > i. carried: [B, H, N, C,
    1], of the state before the chunk when token i reads. kept: [B, H, N, C, 1], of token i's write
    at the end of the chunk. whole: [B, H, N, 1, 1], of the state before the chunk at its end.
    """

    pair: Tensor
    carried: Tensor
    kept: Tensor
    whole: Tensor


def cut(x: Tensor, chunk: int) -> Tensor:
    """Cut [B, H, L, ...] into [B, H, N, C, ...], padded with 0: such keys write nothing."""
    short = -x.shape[2] % chunk
    if short:
        x = F.pad(x, [0, 0] * (x.ndim - 3) + [0, short])
    return x.unflatten(2, (-1, chunk))


def join(x: Tensor, length: int) -> Tensor:
    """Undo `cut`."""
    return x.flatten(2, 3)[:, :, :length]


def start(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    """Return the state before the first token, [B, H, D, M], in the dtype of all arithmetic; zero
    if none is given.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    return (
        v.new_zeros(*v.shape[:2], q.shape[-1], v.shape[-1], dtype=dtype)
        if state is None
        else state.to(dtype)
    )


def fading(
    log_decay: Tensor | None, resets: Tensor | None, chunk: int, dtype: torch.dtype
) -> Fading | None:
    """Return how writes fade, in `dtype`; None if they do not.

    log_decay: [B, H, L], at most 0: the state is multiplied by its exponential before a token reads
    or writes. resets: [B, L] bool, True where a token starts with an empty state.
    """
    if log_decay is None and resets is None:
        return None
    causal = None
    if resets is not None:
        # Documents numbered within the chunk; 0 continues the one before it.
        document = cut(resets[:, None].long(), chunk).cumsum(-1)
        pair = document[..., :, None] == document[..., None, :]
        carried, kept = document == 0, document == document[..., -1:]
        causal = pair.tril()
    if log_decay is None:
        assert causal is not None
        return Fading(
            *(
                x.to(dtype)
                for x in (causal, carried[..., None], kept[..., None], carried[..., -1, None, None])
            )
        )
    # Differences of sums of logarithms: quotients of products would be 0 / 0 after a long fade.
    total = cut(log_decay.to(dtype), chunk).cumsum(-1)
    if causal is None:
        causal = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).tril()
        carried = kept = torch.ones((), dtype=torch.bool, device=total.device)
    # Masked before the exponential: above the diagonal differences are positive and may overflow.
    pairs = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    since = total.masked_fill(~carried, float("-inf")).exp()
    until = (total[..., -1:] - total).masked_fill(~kept, float("-inf")).exp()
    return Fading(pairs, since[..., None], until[..., None], since[..., -1, None, None])
