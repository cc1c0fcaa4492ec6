"""The sum rule of linear attention (Katharopoulos et al. 2020; Schlag et al. 2021, equations 17 and 18).

S_t = S_(t-1) + k_t v_t^T,  y_t = S_t^T q_t; chunk by chunk Y = Q S + tril(Q K^T) V and S becomes S + K^T V. The letters
are those of `chunks`.
"""

import torch
from torch import Tensor

from memshard.models.fast_weights.chunks import cut, fading, join


def sum_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    log_decay: Tensor | None = None,
    resets: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention without its denominator: what `delta_rule` does, except that a write does not look at the state.

    Arguments, result and precision as there, without beta.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    length = v.shape[2]
    chunk = max(1, min(chunk, length))
    if state is None:
        state = v.new_zeros(*v.shape[:2], q.shape[-1], v.shape[-1], dtype=dtype)
    if not length:
        return v, state.to(dtype)
    with torch.autocast(v.device.type, enabled=False):
        faded = fading(None if log_decay is None else log_decay.to(dtype), resets, chunk)
        queries, keys, values = (cut(x.to(dtype), chunk) for x in (q, k, v))
        scores = queries @ keys.mT
        inside = (scores.tril() if faded is None else scores * faded.pair.to(dtype)) @ values
        added = (keys if faded is None else keys * faded.kept.to(dtype)).mT @ values
        whole = [None] * added.shape[2] if faded is None else list(faded.whole.to(dtype).unbind(2))
        state, starts = state.to(dtype), []
        for new, kept in zip(added.unbind(2), whole, strict=True):
            starts.append(state)
            state = (state if kept is None else kept * state) + new
        out = (queries if faded is None else queries * faded.carried.to(dtype)) @ torch.stack(starts, 2) + inside
    return join(out, length).to(v.dtype), state


def sum_everywhere(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Linear attention that sees all keys, with its denominator: for encoders, and from a decoder to an encoder.

    q: [B, H, L, D]; k: [B, H, K, D] and v: [B, H, K, M] of any other length K; real: [B, K] bool, False for padding. Returns
    [B, H, L, M] in v's dtype; 0 where no key is real.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        queries, keys, values = (x.to(dtype) for x in (q, k, v))
        if real is not None:
            keys = keys * real[:, None, :, None]
        out = queries @ (keys.mT @ values) / (queries @ keys.sum(2)[..., None] + eps)
    return out.to(v.dtype)
