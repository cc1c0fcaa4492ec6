"""Bandwidths of what a memory layer does, as shares of a copy measured in the same minute."""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from memshard.bench.gpu.bench import Bench, Result, tried
from memshard.bench.gpu.clock import copy_rate, seconds
from memshard.bench.values.gpu import new_table, reads, updates
from memshard.models.kernels.backend import lookup_for
from memshard.models.memory.look_up import look_up
from memshard.models.memory.product_key import half_scores, weigh
from memshard.models.memory.product_topk import product_topk
from memshard.trainer.precision import DTYPES

_LARGE = 40e9
"""Bytes free from which the table has a million rows; its fp32 values and moments are 13 GB."""


def run(bench: Bench) -> Iterator[tuple[str, Result]]:
    """Yield the copy, then seconds, bytes and shares of reads, both gradients, the row update and
    the sort by dtype of the table, and of searches by precision.
    """
    copy = copy_rate(bench.device)
    yield "copy", {"bytes_per_s": copy}
    sizes = _sizes(bench)
    yield "sizes", vars(sizes)
    for dtype in DTYPES:
        yield f"table of {dtype}", tried(partial(_shares, bench, sizes, DTYPES[dtype], copy))
    for precision in ("fp32", "tf32", "bf16x3", None):
        name = precision or "plain torch"
        yield f"search, {name}", tried(partial(searches, bench, precision, copy))


def _shares(bench: Bench, sizes: Namespace, dtype: torch.dtype, copy: float) -> Result:
    timed = {
        **reads(sizes, dtype, bench.device),
        **gradients(sizes, dtype, bench.device),
        **updates(sizes, dtype, bench.device),
    }
    return {
        what: {"ms": time * 1e3, "bytes": size, "share": size / time / copy}
        for what, (time, size) in timed.items()
    }


def _sizes(bench: Bench) -> Namespace:
    if not bench.cuda:
        return Namespace(slots=16_384, dim=64, reads=16, tokens=256)
    large = torch.cuda.mem_get_info()[0] > _LARGE
    return Namespace(slots=1 << (20 if large else 18), dim=1024, reads=128, tokens=4096)


def gradients(
    sizes: Namespace, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[float, int]]:
    """Return seconds and bytes of the backward pass of a read (gradients of the weights), of the
    gradients of its rows, summed and written, and of sorting the reads by row.
    """
    table = new_table(sizes, dtype, device)
    rows = torch.randint(sizes.slots, (sizes.tokens, sizes.reads), device=device)
    weights = torch.rand(sizes.tokens, sizes.reads, device=device).requires_grad_()
    upstream = torch.randn(sizes.tokens, sizes.dim, device=device)
    table.has_optimizer = True  # an optimizer takes the reads: here, `drop_reads`
    # In training a GPU keeps the gradients of sums in bf16.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        sums = table.weighted_sum(rows, weights)

    def backward() -> None:
        torch.autograd.grad(sums, weights, upstream, retain_graph=True)
        table.drop_reads()

    time = seconds(backward, device)
    once = upstream.nbytes
    result = {"gradients of weights": (time, rows.numel() * sizes.dim * dtype.itemsize + once)}
    sums.backward(upstream)
    (part,) = table.gradients(1.0)
    size = (rows.numel() * part.upstream.itemsize + len(rows.unique()) * 4) * sizes.dim
    result["gradients of rows"] = (seconds(lambda: part.sums(0, len(part.rows)), device), size)
    flat = rows.flatten().int()
    # Numbers of rows read, in order written, with their places.
    result["sort of reads"] = (
        seconds(lambda: table.backend.sort_reads(flat, len(table.weight)), device),
        rows.numel() * (4 + 4 + 8),
    )
    table.drop_reads()
    return result


def searches(bench: Bench, precision: str | None, copy: float) -> Result:
    """Return times of a search for a table of a million rows by 16k tokens, alone and with its
    backward. The share is that of what has to move: queries, sub-keys, rows and weights.

    precision: of the kernels' scores; None for plain torch.
    """
    tokens, keys, width, k = (16_384, 1024, 512, 32) if bench.cuda else (128, 64, 32, 8)
    heads = 4
    queries = torch.randn(tokens, heads, width, device=bench.device, requires_grad=True)
    sub_keys = torch.randn(heads, 2, keys, width // 2, device=bench.device, requires_grad=True)
    lookup = precision and lookup_for(queries, sub_keys, k, precision)
    if precision and not lookup:
        return {"skipped": "no kernel serves it here", "ok": not bench.cuda}

    def search() -> Tensor:
        if lookup:
            return look_up(lookup, queries, sub_keys, k, "softmax", precision or "")[1]
        return weigh(product_topk(*half_scores(queries, sub_keys), k)[0], "softmax")

    upstream = torch.randn_like(search())

    def both() -> object:
        return torch.autograd.grad(search(), (queries, sub_keys), upstream)

    with torch.no_grad():
        time = seconds(search, bench.device)
    moved = 4 * (queries.numel() + sub_keys.numel() + 2 * upstream.numel())
    return {
        "ms": time * 1e3,
        "with backward, ms": seconds(both, bench.device) * 1e3,
        "flops": 2 * tokens * heads * keys * width / time,
        "share": moved / time / copy,
    }
