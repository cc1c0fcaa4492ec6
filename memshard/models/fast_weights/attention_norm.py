"""Attention normalisation: what fast weights read is divided by the sum over all keys written
(Schlag et al. 2021, section 4.2).

The sum z of the keys is computed as the memory of one more value feature, the constant 1, so a
state is [B, H, D, M + 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.fast_weights.delta_rule import delta_rule
from memshard.models.fast_weights.segments import Rule
from memshard.models.fast_weights.sum_rule import sum_rule


def normalised_sum_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    eps: float = 1e-6,
    sums: Rule = sum_rule,
) -> tuple[Tensor, Tensor]:
    """Do what `sum_rule` does, with y_t = S_t^T q_t / (z_t . q_t + eps): causal linear attention.
    Features must not be negative. sums: `sum_rule`, or that of a segment (`segments.py`).
    """
    with torch.autocast(v.device.type, enabled=False):
        out, state = sums(
            q,
            k,
            F.pad(v.to(torch.promote_types(v.dtype, torch.float32)), (0, 1), value=1.0),
            state,
            resets=resets,
        )
        out = out[..., :-1] / (out[..., -1:] + eps)
    return out.to(v.dtype), state


def normalised_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    eps: float = 1e-6,
    delta: Rule = delta_rule,
    sums: Rule = sum_rule,
) -> tuple[Tensor, Tensor]:
    """Do what `delta_rule` does, with its two reads, of the old value and of the result, divided by
    z_(t-1) . k_t and z_t . q_t + eps.

    The first divisor is 1 where nothing has been written. It grows with the number of tokens, so
    this is not for endless streams. delta, sums: `delta_rule` and `sum_rule`, or those
    of a segment (`segments.py`).
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    memory, total = (None, None) if state is None else (state[..., :-1], state[..., -1:])
    with torch.autocast(v.device.type, enabled=False):
        q, k, beta = q.to(dtype), k.to(dtype), beta.to(dtype)
        ones = torch.ones_like(v[..., :1], dtype=dtype)
        # One pass computes both sums: of queries, and of keys. The latter is z_t . k_t, from which
        # the token's key is subtracted for z_(t-1) . k_t.
        both, total = sums(
            torch.cat((q, k), 1),
            # Heads 0 to H - 1 are read by the queries, H to 2 H - 1 by the keys.
            k.repeat(1, 2, 1, 1),
            ones.repeat(1, 2, 1, 1),
            _twice(total),
            resets=resets,
        )
        reads, olds = both.squeeze(-1).chunk(2, dim=1)
        olds = olds - (k * k).sum(-1)
        # 0, or by rounding just below, means that nothing was written along this key: features are
        # not negative, so the memory reads 0 as well, and any divisor but 0 will do.
        olds = torch.where(olds > 0, olds, 1.0)
        # The rule writes beta k (v - S^T k). With k / olds for k and beta olds for beta, the read
        # inside is divided by olds, and the factors cancel in the write.
        out, memory = delta(q, k / olds[..., None], v.to(dtype), beta * olds, memory, resets=resets)
        out = out / (reads[..., None] + eps)
    # The two halves of `total` are equal: both add up the same keys.
    return out.to(v.dtype), torch.cat((memory, total.chunk(2, dim=1)[0]), -1)


def _twice(total: Tensor | None) -> Tensor | None:
    return None if total is None else total.repeat(1, 2, 1, 1)
