"""The sum rule of linear attention (Katharopoulos et al. 2020; Schlag et al. 2021,
equations 17 and 18).

S_t = S_(t-1) + k_t v_t^T,  y_t = S_t^T q_t. Chunk by chunk, Y = Q S + tril(Q K^T) V, and S becomes
S + K^T V. Letters as in `chunks`.
"""

import torch
from torch import Tensor

from memshard.models.fast_weights.chunks import cut, fading, join, start


def sum_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    log_decay: Tensor | None = None,
    resets: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Do what `delta_rule` does, with writes that do not depend on the state: causal linear
    attention without its denominator.

    Arguments, result and precision are those of `delta_rule`, without beta.
    """
    state, length = start(q, v, state), v.shape[2]
    if not length:
        return v, state
    chunk = min(chunk, length)
    with torch.autocast(v.device.type, enabled=False):
        faded = fading(log_decay, resets, chunk, state.dtype)
        queries, keys, values = (cut(x.to(state.dtype), chunk) for x in (q, k, v))
        scores = queries @ keys.mT
        inside = (scores.tril() if faded is None else scores * faded.pair) @ values
        added = (keys if faded is None else keys * faded.kept).mT @ values
        whole = [None] * added.shape[2] if faded is None else list(faded.whole.unbind(2))
        starts = []
        # The only serial part; everything else is one product over all chunks.
        for new, kept in zip(added.unbind(2), whole, strict=True):
            starts.append(state)
            state = (state if kept is None else kept * state) + new
        out = (queries if faded is None else queries * faded.carried) @ torch.stack(
            starts, 2
        ) + inside
    return join(out, length).to(v.dtype), state


def written_sum(k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
    """Return the sum over all keys and values, [B, H, D, M + 1]; the last column is the sum of the
    keys. k: [B, H, K, D]; v: [B, H, K, M]; real: [B, K] bool, False for padding.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        keys = k.to(dtype) if real is None else k.to(dtype) * real[:, None, :, None]
        return torch.cat((keys.mT @ v.to(dtype), keys.sum(2)[..., None]), -1)


def read_sum(q: Tensor, written: Tensor, eps: float = 1e-6) -> Tensor:
    """Return linear attention with its denominator, [B, H, L, M] in written's dtype; 0 where no key
    was real. q: [B, H, L, D]; written: the result of `written_sum`.
    """
    with torch.autocast(q.device.type, enabled=False):
        out = q.to(written.dtype) @ written
        return out[..., :-1] / (out[..., -1:] + eps)
