"""The delta rule (Schlag et al. 2021, equations 23 to 25), chunk by chunk,
with an explicit backward.

S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T,  y_t = S_t^T q_t.

Inside a chunk the writes depend on each other through a unit lower triangular system (Yang et al.
2024, section 3): with A = tril(diag(beta) K K^T, -1), the values actually written are U = (I +
A)^-1 diag(beta) (V - K S), where S is the state before the chunk; then Y = Q S + tril(Q K^T) U, and
S becomes S + K^T U. All chunks are solved at once; only S passes from one to the next. Letters as
in `chunks`.
"""

from typing import Any

import torch
from torch import Tensor

from memshard.models.fast_weights.chunks import Fading, cut, fading, join, start
from memshard.models.kernels.delta_steps import Steps, steps_for
from memshard.models.kernels.fla_delta_rule import by_kernel, kernel_for
from memshard.models.kernels.scan import scan_for
from memshard.models.once import Saved, differentiable_once


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    log_decay: Tensor | None = None,
    resets: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """Read a fast weight matrix by queries while keys write to it.

    q, k: [B, H, L, D]; v: [B, H, L, M]; beta: [B, H, L], the write strength, in [0, 1] with keys of
    norm at most 1 (beyond that, the state may grow without bound); state: [B, H, D, M] before the
    first token, default zero. log_decay: [B, H, L], at most 0, a gate on the state before each
    token (Yang et al. 2025). resets: [B, L] bool, True where a token starts with an empty state.
    chunk: tokens solved together; the result does not depend on it.

    Returns [B, H, L, M] in v's dtype and the state after the last token. Arithmetic and state are
    fp32, or fp64 if v is; memory grows with L (D + M) + L / chunk D M. On a GPU, 16-bit values
    without log_decay may go to `kernels.fla_delta_rule`.
    """
    state, length = start(q, v, state), v.shape[2]
    if not length:
        return v, state
    kernel = kernel_for(q, v, delta_rule) if log_decay is None else None
    if kernel is not None:
        return by_kernel(kernel, q, k, v, beta, state, resets)
    chunk = min(chunk, length)
    with torch.autocast(v.device.type, enabled=False):
        faded = fading(log_decay, resets, chunk, state.dtype)
        # As chunks take them: products would copy other orders once each.
        ordered = (x.to(state.dtype).contiguous() for x in (q, k, v, beta[..., None]))
        blocks = [cut(x, chunk) for x in ordered]
        out, state = _DeltaRule.apply(
            *blocks, state, *((None,) * 4 if faded is None else vars(faded).values())
        )
    return join(out, length).to(v.dtype), state


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, *fade: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        faded = None if fade[0] is None else Fading(*fade)  # type: ignore[arg-type]
        steps = steps_for(q, v, PLAIN) if faded is None else PLAIN
        inverse, key_writes, writes, added = steps.solve(k, v, beta, faded)
        scan = scan_for(state, key_writes, plain_scan)
        kept, whole = _kept(k, faded).mT, _whole(faded)
        states, taken, state = scan(state, added, kept, key_writes, whole, False)
        out = steps.read(q, k, writes - taken, states, faded)
        ctx.save_for_backward(q, k, v, beta, inverse, states, *fade)
        return out, state

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: Saved, d_out: Tensor, d_state: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, beta, inverse, states, *fade = saved
        faded = None if fade[0] is None else Fading(*fade)
        steps = steps_for(q, v, PLAIN) if faded is None else PLAIN
        with torch.autocast(q.device.type, enabled=False):
            # Writes are computed again, from the inverses and the states that chunks began with:
            # for 2,048 tokens and chunks of 32 the states are 64 matrices, not 2,048.
            errors, writes, key_writes, d_writes, d_starts = steps.begin(
                q, k, v, beta, inverse, states, d_out, faded
            )
            # The state's gradient obeys the same recursion from the last chunk to the first, with
            # the two factors transposed and exchanged.
            kept, whole = _kept(k, faded), _whole(faded)
            scan = scan_for(d_state, kept, plain_scan)
            d_ends, passed, d_state = scan(d_state, d_starts, key_writes.mT, kept, whole, True)
            d_q, d_k, d_v, d_beta, *d_fade = steps.end(
                q,
                k,
                beta,
                inverse,
                states,
                d_out,
                errors,
                writes,
                d_writes + passed,
                d_ends,
                faded,
            )
        return d_q, d_k, d_v, d_beta, d_state, *(d_fade or (None,) * 4)


def solve(k: Tensor, v: Tensor, beta: Tensor, faded: Fading | None = None) -> tuple[Tensor, ...]:
    """Return (I + A)^-1, [..., C, C], key writes [..., C, D], writes [..., C, M] and what these add
    to a state, [..., D, M], of all chunks.

    U = (I + A)^-1 diag(beta) (V - K S) is linear in S: U = writes - key_writes S. Both factors are
    formed for all chunks at once, before any S is known; the scan forms key_writes S.
    """
    inverse = _inverse(k, beta, faded)
    key_writes, writes = inverse @ (beta * _carried(k, faded)), inverse @ (beta * v)
    return inverse, key_writes, writes, _kept(k, faded).mT @ writes


def read(
    q: Tensor, k: Tensor, writes: Tensor, states: Tensor, faded: Fading | None = None
) -> Tensor:
    """Return Y from the values written and the states that chunks begin with."""
    return _carried(q, faded) @ states + _pairs(q @ k.mT, faded) @ writes


def begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    inverse: Tensor,
    states: Tensor,
    d_out: Tensor,
    faded: Fading | None = None,
) -> tuple[Tensor, ...]:
    """Return errors, the values written, key writes, and the gradients of the values written and of
    the states that chunks begin with, but for what later chunks add to these.
    """
    k_carried = _carried(k, faded)
    errors = v - k_carried @ states
    writes = inverse @ (beta * errors)
    key_writes = inverse @ (beta * k_carried)
    d_writes = _pairs(q @ k.mT, faded).mT @ d_out
    d_starts = _carried(q, faded).mT @ d_out - key_writes.mT @ d_writes
    return errors, writes, key_writes, d_writes, d_starts


def end(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    inverse: Tensor,
    states: Tensor,
    d_out: Tensor,
    errors: Tensor,
    writes: Tensor,
    d_writes: Tensor,
    d_ends: Tensor,
    faded: Fading | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, beta and, where writes fade, of how they do. d_ends: of the
    states that chunks end with.
    """
    # U = (I + A)^-1 R, so dR = (I + A)^-T dU, and dA = -dR U^T below the diagonal.
    d_right = inverse.mT @ d_writes
    d_system = -(d_right @ writes.mT).tril(-1)
    d_attention = (d_out @ writes.mT).tril()
    d_values = beta * d_right
    # K K^T has the keys on both sides, so its gradient enters d_k with its transpose.
    d_gram = _faded(beta * d_system, faded)
    d_scores = _faded(d_attention, faded)
    reads, late, early = d_out @ states.mT, writes @ d_ends.mT, d_values @ states.mT
    d_q = _carried(reads, faded) + d_scores @ k
    d_k = d_scores.mT @ q + (d_gram + d_gram.mT) @ k + _kept(late, faded) - _carried(early, faded)
    gram = k @ k.mT
    d_beta = (d_right * errors).sum(-1, keepdim=True) + _faded(d_system * gram, faded).sum(
        -1, keepdim=True
    )
    if faded is None:
        return d_q, d_k, d_values, d_beta
    d_pair = d_attention * (q @ k.mT) + d_system * beta * gram
    d_carried = (reads * q).sum(-1, keepdim=True) - (early * k).sum(-1, keepdim=True)
    d_kept = (late * k).sum(-1, keepdim=True)
    d_whole = (d_ends * states).sum((-2, -1), keepdim=True)
    shaped = [
        d.sum_to_size(f.shape)
        for d, f in zip((d_pair, d_carried, d_kept, d_whole), vars(faded).values(), strict=True)
    ]
    return d_q, d_k, d_values, d_beta, *shaped


PLAIN = Steps(solve, read, begin, end)


def plain_scan(
    state: Tensor,
    added: Tensor,
    left: Tensor,
    right: Tensor,
    whole: Tensor | None,
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the only serial part: state = whole state + added - left (right state), chunk by chunk.

    whole: see `Fading`. Returns the states that chunks begin with, right times these, and the last
    state.
    """
    kepts = [None] * added.shape[2] if whole is None else list(whole.unbind(2))
    parts = list(
        zip(*(x.flatten(0, 1).unbind(1) for x in (added, left, right)), kepts, strict=True)
    )
    states, products = [], []
    # One batch dimension: bmm and baddbmm take no more, and each step is two calls.
    heads, state = state.shape[:2], state.flatten(0, 1)
    for add, to_state, from_state, kept in reversed(parts) if backward else parts:
        product = torch.bmm(from_state, state)
        states.append(state)
        products.append(product)
        base = add + (state if kept is None else (state.unflatten(0, heads) * kept).flatten(0, 1))
        state = torch.baddbmm(base, to_state, product, alpha=-1)
    if backward:
        states.reverse()
        products.reverse()
    before, read = (torch.stack(x, 1).unflatten(0, heads) for x in (states, products))
    return before, read, state.unflatten(0, heads)


def _inverse(k: Tensor, beta: Tensor, faded: Fading | None) -> Tensor:
    """Return (I + A)^-1 by forward substitution, which stays exact for repeated keys, where
    products of powers of A overflow.
    """
    # Explicit, since four products per chunk, forward and backward, use it.
    identity = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:-1], -1)
    return torch.linalg.solve_triangular(
        _faded(beta * (k @ k.mT), faded), identity, upper=False, unitriangular=True
    )


def _whole(faded: Fading | None) -> Tensor | None:
    return None if faded is None else faded.whole


def _faded(x: Tensor, faded: Fading | None) -> Tensor:
    return x if faded is None else x * faded.pair


def _pairs(scores: Tensor, faded: Fading | None) -> Tensor:
    return scores.tril() if faded is None else scores * faded.pair


def _carried(x: Tensor, faded: Fading | None) -> Tensor:
    return x if faded is None else x * faded.carried


def _kept(x: Tensor, faded: Fading | None) -> Tensor:
    return x if faded is None else x * faded.kept
