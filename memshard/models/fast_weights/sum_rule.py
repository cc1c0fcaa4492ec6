"""The sum rule of linear attention (Katharopoulos et al. 2020; Schlag et al. 2021, equations 17 and
18).

S_t = S_(t-1) + k_t v_t^T,  y_t = S_t^T q_t; chunk by chunk Y = Q S + tril(Q K^T) V and S becomes S
+ K^T V. The letters are those of `chunks`.
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
    """Causal linear attention without its denominator: what `delta_rule` does, except that a write
    does not look at the state.

    Arguments, result and precision as there, without beta.
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
        for new, kept in zip(added.unbind(2), whole, strict=True):
            starts.append(state)
            state = (state if kept is None else kept * state) + new
        out = (queries if faded is None else queries * faded.carried) @ torch.stack(
            starts, 2
        ) + inside
    return join(out, length).to(v.dtype), state


def sum_everywhere(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Linear attention that sees all keys, with its denominator: for encoders, and from a decoder
    to an encoder.

    q: [B, H, L, D]; k: [B, H, K, D] and v: [B, H, K, M] of any other length K; real: [B, K] bool,
    False for padding. Returns [B, H, L, M] in v's dtype; 0 where no key is real.
    """
    return read_sum(q, written_sum(k, v, real), eps).to(v.dtype)


def written_sum(k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
    """What `sum_everywhere` keeps of keys and values, whatever their number: [B, H, D, M + 1], the
    last column the sum of the keys.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        keys = k.to(dtype) if real is None else k.to(dtype) * real[:, None, :, None]
        return torch.cat((keys.mT @ v.to(dtype), keys.sum(2)[..., None]), -1)


def read_sum(q: Tensor, written: Tensor, eps: float = 1e-6) -> Tensor:
    """Read what `written_sum` keeps. q: [B, H, L, D]; returns [B, H, L, M] in written's dtype."""
    with torch.autocast(q.device.type, enabled=False):
        out = q.to(written.dtype) @ written
        return out[..., :-1] / (out[..., -1:] + eps)
