"""The delta rule inside its chunks, one program a chunk; `fast_weights/delta_rule.py` has it in
torch, with 70 launches.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memshard.models.kernels.delta_steps import Steps


@triton.jit
def tile(matrices, number, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return matrix `number` of [n, rows, columns], with 0 beyond it."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    place = matrices + (number * rows + row) * columns + column
    return tl.load(place, mask=(row < rows) & (column < columns), other=0.0)


@triton.jit
def keep(matrices, x, number, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store x as matrix `number` of [n, rows, columns]."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    place = matrices + (number * rows + row) * columns + column
    tl.store(place, x, mask=(row < rows) & (column < columns))


@triton.jit
def product(x, y):
    """Return the product of two tiles in fp32."""
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def solve_chunks(
    k,
    v,
    beta,
    inverses,
    key_writes,
    writes,
    added,
    features,
    width,
    chunk,
    F: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
):
    """Do what `delta_rule.solve` does."""
    number = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    keys, strength = tile(k, number, chunk, features, C, F), tile(beta, number, chunk, 1, C, 1)
    system = tl.where(row > column, strength * product(keys, tl.trans(keys)), 0.0)
    inverse = tl.where(row == column, 1.0, 0.0)
    # Row by row, as forward substitution does: rows above are done.
    for token in range(1, chunk):
        factors = tl.sum(tl.where(row == token, system, 0.0), 0)
        above = tl.sum(factors[:, None] * inverse, 0)
        inverse = tl.where(row == token, inverse - above[None, :], inverse)
    written = product(inverse, strength * tile(v, number, chunk, width, C, W))
    keep(inverses, inverse, number, chunk, chunk, C, C)
    keep(key_writes, product(inverse, strength * keys), number, chunk, features, C, F)
    keep(writes, written, number, chunk, width, C, W)
    keep(added, product(tl.trans(keys), written), number, features, width, F, W)


@triton.jit
def read_chunks(
    q,
    k,
    writes,
    states,
    out,
    features,
    width,
    chunk,
    F: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
):
    """Do what `delta_rule.read` does."""
    number = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    queries, keys = tile(q, number, chunk, features, C, F), tile(k, number, chunk, features, C, F)
    scores = tl.where(row >= column, product(queries, tl.trans(keys)), 0.0)
    read = product(queries, tile(states, number, features, width, F, W))
    read += product(scores, tile(writes, number, chunk, width, C, W))
    keep(out, read, number, chunk, width, C, W)


@triton.jit
def begin_gradients(
    q,
    k,
    v,
    beta,
    inverses,
    states,
    d_out,
    errors,
    writes,
    key_writes,
    d_writes,
    d_starts,
    features,
    width,
    chunk,
    F: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
):
    """Do what `delta_rule.begin` does."""
    number = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    queries, keys = tile(q, number, chunk, features, C, F), tile(k, number, chunk, features, C, F)
    strength, inverse = (
        tile(beta, number, chunk, 1, C, 1),
        tile(inverses, number, chunk, chunk, C, C),
    )
    upstream = tile(d_out, number, chunk, width, C, W)
    error = tile(v, number, chunk, width, C, W)
    error -= product(keys, tile(states, number, features, width, F, W))
    keep(errors, error, number, chunk, width, C, W)
    keep(writes, product(inverse, strength * error), number, chunk, width, C, W)
    key_write = product(inverse, strength * keys)
    keep(key_writes, key_write, number, chunk, features, C, F)
    scores = tl.where(row >= column, product(queries, tl.trans(keys)), 0.0)
    d_write = product(tl.trans(scores), upstream)
    keep(d_writes, d_write, number, chunk, width, C, W)
    d_start = product(tl.trans(queries), upstream) - product(tl.trans(key_write), d_write)
    keep(d_starts, d_start, number, features, width, F, W)


@triton.jit
def end_gradients(
    q,
    k,
    beta,
    inverses,
    states,
    d_out,
    errors,
    writes,
    d_writes,
    d_ends,
    d_q,
    d_k,
    d_v,
    d_beta,
    features,
    width,
    chunk,
    F: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
):
    """Do what `delta_rule.end` does."""
    number = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    queries, keys = tile(q, number, chunk, features, C, F), tile(k, number, chunk, features, C, F)
    strength, inverse = (
        tile(beta, number, chunk, 1, C, 1),
        tile(inverses, number, chunk, chunk, C, C),
    )
    written, upstream = (
        tile(writes, number, chunk, width, C, W),
        tile(d_out, number, chunk, width, C, W),
    )
    d_right = product(tl.trans(inverse), tile(d_writes, number, chunk, width, C, W))
    d_system = tl.where(row > column, -product(d_right, tl.trans(written)), 0.0)
    d_scores = tl.where(row >= column, product(upstream, tl.trans(written)), 0.0)
    gram = product(keys, tl.trans(keys))
    d_strength = tl.sum(d_right * tile(errors, number, chunk, width, C, W), 1)
    d_strength += tl.sum(d_system * gram, 1)
    keep(d_beta, d_strength[:, None], number, chunk, 1, C, 1)
    d_value = strength * d_right
    keep(d_v, d_value, number, chunk, width, C, W)
    state = tl.trans(tile(states, number, features, width, F, W))
    d_query = product(upstream, state) + product(d_scores, keys)
    keep(d_q, d_query, number, chunk, features, C, F)
    d_gram = strength * d_system
    d_key = product(tl.trans(d_scores), queries) + product(d_gram + tl.trans(d_gram), keys)
    d_key += product(written, tl.trans(tile(d_ends, number, features, width, F, W)))
    d_key -= product(d_value, state)
    keep(d_k, d_key, number, chunk, features, C, F)


def steps() -> Steps:
    """Return `Steps` of the kernels."""
    return Steps(solve, read, begin, end)


def solve(k: Tensor, v: Tensor, beta: Tensor, faded: None = None) -> tuple[Tensor, ...]:
    """Do what `delta_rule.solve` does. Tensors in fp32, here and below."""
    features, width, chunk = k.shape[-1], v.shape[-1], k.shape[-2]
    outs = (
        _made(k, chunk, chunk),
        _made(k, chunk, features),
        _made(k, chunk, width),
        _made(k, features, width),
    )
    _launch(solve_chunks, (k, v, beta), outs, features, width)
    return outs


def read(q: Tensor, k: Tensor, writes: Tensor, states: Tensor, faded: None = None) -> Tensor:
    """Do what `delta_rule.read` does."""
    out = torch.empty_like(writes, memory_format=torch.contiguous_format)
    _launch(read_chunks, (q, k, writes, states), (out,), *states.shape[-2:])
    return out


def begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    inverse: Tensor,
    states: Tensor,
    d_out: Tensor,
    faded: None = None,
) -> tuple[Tensor, ...]:
    """Do what `delta_rule.begin` does."""
    features, width, chunk = k.shape[-1], v.shape[-1], k.shape[-2]
    outs = (
        _made(k, chunk, width),
        _made(k, chunk, width),
        _made(k, chunk, features),
        _made(k, chunk, width),
        _made(k, features, width),
    )
    _launch(begin_gradients, (q, k, v, beta, inverse, states, d_out), outs, features, width)
    return outs


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
    faded: None = None,
) -> tuple[Tensor, ...]:
    """Do what `delta_rule.end` does."""
    features, width, chunk = k.shape[-1], d_out.shape[-1], k.shape[-2]
    outs = (
        _made(k, chunk, features),
        _made(k, chunk, features),
        _made(k, chunk, width),
        _made(k, chunk, 1),
    )
    inputs = q, k, beta, inverse, states, d_out, errors, writes, d_writes, d_ends
    _launch(end_gradients, inputs, outs, features, width)
    return outs


def _made(like: Tensor, *shape: int) -> Tensor:
    """Return an array with a matrix for each chunk."""
    return like.new_empty(*like.shape[:-2], *shape)


def _launch(
    kernel: Any, inputs: tuple[Tensor, ...], outs: tuple[Tensor, ...], features: int, width: int
) -> None:
    q = inputs[0]
    chunk = q.shape[-2]
    with torch.cuda.device_of(q):
        kernel[(q.shape[:-2].numel(),)](
            *(x.contiguous() for x in inputs),
            *outs,
            features,
            width,
            chunk,
            # Products of tiles take 16 at least.
            F=max(16, triton.next_power_of_2(features)),
            W=max(16, triton.next_power_of_2(width)),
            C=max(16, triton.next_power_of_2(chunk)),
            num_warps=8,
        )
