"""Kernels against plain torch on the same device: every operation on rows, in every dtype, at
widths that fill vectors and that do not, and beyond 2^31 values; searches in every precision.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from memshard.bench.gpu.bench import Bench, Result, tried
from memshard.models.kernels import plain_rows
from memshard.models.kernels.backend import RowBackend, backend_for, lookup_for, search_for
from memshard.models.kernels.plain_rows import AdamUpdate
from memshard.models.kernels.plain_topk import product_search
from memshard.trainer.precision import DTYPES

SUMS = 3e-5
"""Largest norm of a difference over the norm: fp32 sums in another order give 1e-6."""
ROUNDED = 1e-3
"""The same of values that were rounded at random to 8 or 11 bits: a sum that differs in its last
bit may fall to a neighbour.
"""
FOUND = {"fp32": 0.9999, "tf32": 0.995, "bf16x3": 0.9999}
"""Least share of the slots that a search finds as plain torch in fp32 does (docs/memory.md)."""
_LARGE_DIM = 1024


def run(bench: Bench) -> Iterator[tuple[str, Result]]:
    """Yield differences: rows by dtype and width, searches by precision, and rows far beyond."""
    backend, path = backend_for(bench.device)
    yield "path", {"path": path, "ok": not bench.cuda or backend is not plain_rows}
    torch.manual_seed(0)
    for dtype in DTYPES:
        for dim in (125, 768, 1024) if bench.cuda else (37, 64):
            work = partial(_rows, bench, backend, DTYPES[dtype], dim)
            yield f"rows of {dim}, {dtype}", tried(work)
    for precision in FOUND:
        yield f"search, {precision}", tried(partial(_search, bench, precision))
    for dtype in DTYPES:
        work = partial(_large, bench, backend, DTYPES[dtype])
        yield f"beyond 2^31 values, {dtype}", tried(work)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference over the norm of theirs; NaN stays NaN."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30))


def _reads(
    bench: Bench, slots: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return values, rows, weights, offsets and gradients of sums: some rows are read often."""
    tokens, reads = (512, 128) if bench.cuda else (32, 16)
    values = torch.randn(slots, dim, device=bench.device).to(dtype)
    # A power of a uniform draw: the first rows are read by every second token.
    rows = (slots * torch.rand(tokens * reads, device=bench.device) ** 4).int()
    weights = torch.rand(tokens * reads, device=bench.device)
    offsets = torch.arange(tokens, device=bench.device) * reads
    return values, rows, weights, offsets, torch.randn(tokens, dim, device=bench.device)


def _rows(bench: Bench, backend: RowBackend, dtype: torch.dtype, dim: int) -> Result:
    values, rows, weights, offsets, upstream = _reads(bench, 20_000, dim, dtype)
    if bench.cuda and dtype == torch.bfloat16 and backend is not plain_rows:
        # As under autocast. Plain torch would sum two in bf16 in bf16.
        upstream = upstream.bfloat16()
    reads = values, rows, weights
    order, distinct, starts = plain_rows.sort_reads(rows, len(values))
    result: Result = {
        "gather_sum": difference(
            backend.gather_sum(*reads, offsets), plain_rows.gather_sum(*reads, offsets)
        ),
        "score_gradients": difference(
            backend.score_gradients(values, rows, offsets, upstream),
            plain_rows.score_gradients(values, rows, offsets, upstream.float()),
        ),
        "segment_sums": difference(
            backend.segment_sums(*reads, offsets), plain_rows.segment_sums(*reads, offsets)
        ),
    }
    update = _update(values, rows, weights, offsets, upstream)
    twin = _copied(update)
    backend.adam_rows(update)
    plain_rows.adam_rows(twin)
    result |= {
        name: difference(getattr(update, name), getattr(twin, name))
        for name in ("exp_avg", "exp_avg_sq", "values")
    }
    ours = backend.sort_reads(rows, len(values))
    sorted_ok = all(
        torch.equal(a.long(), b) for a, b in zip(ours, (order, distinct, starts), strict=True)
    )
    return {**result, "sort_reads": sorted_ok, "ok": sorted_ok and _within(result, dtype)}


def _within(result: Result, dtype: torch.dtype) -> bool:
    rounded = ROUNDED if dtype != torch.float32 else SUMS
    return all(x <= (rounded if name == "values" else SUMS) for name, x in result.items())


def _update(
    values: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor, upstream: Tensor
) -> AdamUpdate:
    """Return an Adam step, without a master copy: 16-bit values are rounded at random."""
    order, distinct, starts = plain_rows.sort_reads(rows, len(values))
    return AdamUpdate(
        values=values,
        exp_avg=torch.zeros(values.shape, device=values.device),
        exp_avg_sq=torch.zeros(values.shape, device=values.device),
        master=None,
        rows=distinct.long(),
        starts=starts,
        bags=plain_rows.bag_of_each_read(offsets, len(rows)).int()[order],
        weights=weights[order],
        upstream=upstream,
        step_sizes=None,
        decay1=None,
        decay2=None,
        step_size=0.01,
        beta1=0.9,
        beta2=0.99,
        eps=1e-6,
        first_row=0,
        first_column=0,
        key=3 << 40,
    )


def _copied(update: AdamUpdate) -> AdamUpdate:
    stored = ("values", "exp_avg", "exp_avg_sq")
    return replace(update, **{name: getattr(update, name).clone() for name in stored})


def _search(bench: Bench, precision: str) -> Result:
    """Compare rows found, weights and gradients with plain torch's, of fresh sub-keys."""
    tokens, keys, half, k = (2048, 512, 256, 32) if bench.cuda else (64, 64, 16, 8)
    heads = 4
    queries = torch.randn(tokens, heads, 2 * half, device=bench.device)
    sub_keys = (torch.rand(heads, 2, keys, half, device=bench.device) * 2 - 1) * half**-0.5
    halves = queries.unflatten(-1, (2, -1)).unbind(-2)
    first, second = (
        torch.einsum("thd,hnd->thn", x, sub_keys[:, side]) for side, x in enumerate(halves)
    )
    i1, i2 = product_search(first, second, k).long()
    scores = first.gather(-1, i1) + second.gather(-1, i2)
    lookup = lookup_for(queries, sub_keys, k, precision)
    if lookup is None:
        if precision != "fp32" or bench.cuda:
            return {"skipped": "no kernel serves it here", "ok": not bench.cuda}
        ours = search_for(first)(first, second, k).long()
        return {"found": 1.0, "ok": torch.equal(ours, torch.stack((i1, i2)))}
    found, bits = lookup.look_up(queries, sub_keys, k, "softmax", precision)
    weights = bits.view(torch.float32)
    rows = (i1 + i2) % keys * keys + i1
    # In any order: rounding swaps neighbours more often than it brings in others.
    same = (found.long()[..., :, None] == rows[..., None, :]).any(-1).float().mean()
    result: Result = {"found": float(same)}
    if precision == "fp32":
        result["weights"] = difference(weights, scores.softmax(-1))
        upstream = torch.randn(tokens, heads, k, device=bench.device)
        result |= _search_gradients(
            queries,
            sub_keys,
            (i1, i2),
            upstream,
            lookup.gradients(queries, sub_keys, found, weights, upstream, "softmax"),
        )
    ok = result["found"] >= FOUND[precision]
    return {**result, "ok": ok and all(x <= 1e-3 for n, x in result.items() if n != "found")}


def _search_gradients(
    queries: Tensor,
    sub_keys: Tensor,
    found: tuple[Tensor, Tensor],
    upstream: Tensor,
    ours: tuple[Tensor | None, Tensor | None],
) -> Result:
    leaves = queries.clone().requires_grad_(), sub_keys.clone().requires_grad_()
    halves = leaves[0].unflatten(-1, (2, -1)).unbind(-2)
    picked = [
        torch.einsum("thd,hnd->thn", x, leaves[1][:, side]).gather(-1, found[side])
        for side, x in enumerate(halves)
    ]
    theirs = torch.autograd.grad((picked[0] + picked[1]).softmax(-1), leaves, upstream)
    names = ("gradient of queries", "gradient of sub-keys")
    return {
        name: float("nan") if a is None else difference(a, b)
        for name, a, b in zip(names, ours, theirs, strict=True)
    }


def _large(bench: Bench, backend: RowBackend, dtype: torch.dtype) -> Result:
    """Compare what is done to the last rows of a table of more than 2^31 values with the same done
    to these rows alone.
    """
    last, slots = 4096, 2**31 // _LARGE_DIM + 4096
    needed = slots * _LARGE_DIM * (dtype.itemsize + 8) * 1.1
    if not bench.cuda or torch.cuda.mem_get_info()[0] < needed:
        return {"skipped": f"needs a GPU with {needed / 1e9:.0f} GB free"}
    small, rows, weights, offsets, upstream = _reads(bench, last, _LARGE_DIM, dtype)
    values = torch.empty(slots, _LARGE_DIM, dtype=dtype, device=bench.device)
    values[-last:] = small
    far = rows + (slots - last)
    result: Result = {
        "gather_sum": difference(
            backend.gather_sum(values, far, weights, offsets),
            backend.gather_sum(small, rows, weights, offsets),
        ),
        "score_gradients": difference(
            backend.score_gradients(values, far, offsets, upstream),
            backend.score_gradients(small, rows, offsets, upstream),
        ),
    }
    twin = _update(small, rows, weights, offsets, upstream)
    update = _update(values, far, weights, offsets, upstream)
    # The random bits of rounding go by the row's number in the whole table.
    twin = replace(twin, first_row=slots - last)
    backend.adam_rows(twin)
    backend.adam_rows(update)
    result |= {
        name: difference(getattr(update, name)[-last:], getattr(twin, name))
        for name in ("exp_avg", "exp_avg_sq", "values")
    }
    return {**result, "ok": _within(result, dtype)}
