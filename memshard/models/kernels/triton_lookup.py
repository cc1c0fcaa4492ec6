"""Product-key search on GPUs: how its Triton kernels are launched. Nothing waits for the device.

With TRITON_INTERPRET=1 they run on CPU tensors, slowly, for tests.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from memshard.models.compat import is_traced
from memshard.models.kernels import triton_rows, triton_search, triton_search_gradient
from memshard.models.kernels.plain_topk import candidate_pairs

MOST_READS = 64
"""The largest k: its 280 pairs fill the registers of a program."""
_TOKENS, _KEYS, _WIDTH = 32, 64, 32
"""Size of a tile: queries, sub-keys, and numbers of each that are multiplied at a time. For tensor
cores twice as many queries: with fewer, a query's scores lie in more threads and some spill.
"""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def serves(queries: Tensor, sub_keys: Tensor, k: int) -> bool:
    """Return whether `look_up` takes these; plain torch takes everything."""
    return (
        queries.device.type == triton_rows.device_type
        and queries.device == sub_keys.device
        and queries.dtype in _DTYPES
        and sub_keys.dtype in _DTYPES
        and k <= MOST_READS
        # Rows and sub-keys are numbered in int32.
        and sub_keys.shape[2] ** 2 < 2**31
        and sub_keys.numel() < 2**31
        and not is_traced(queries)
        and not is_traced(sub_keys)
    )


def look_up(
    queries: Tensor, sub_keys: Tensor, k: int, weighting: str, precision: str = "fp32"
) -> Tensor:
    """Return rows and weights of the k best slots of each query: [2, tokens, heads, k] int32, the
    second half of which is the bits of fp32.

    queries: [tokens, heads, 2 * half]; sub_keys: [heads, 2, keys, half]; fp32, fp16 or bf16.
    Rows are in the order of `slot_rows`; best first, ties in the order that `product_topk`
    documents. precision: of the products that scores are sums of: fp32, or on tensor cores tf32 or
    bf16x3; sums are fp32.
    """
    queries, sub_keys = queries.contiguous(), sub_keys.contiguous()
    tokens, (heads, _, keys, half) = len(queries), sub_keys.shape
    found = queries.new_empty(2, tokens, heads, k, dtype=torch.int32)
    if not tokens:
        return found
    best = queries.new_empty(tokens, heads, 2, k, dtype=torch.int64)
    width, ranks = _power(k), _ranks(k, queries.device)
    size = 1 if precision == "fp32" else 2
    pairs = ranks.shape[1]
    with torch.cuda.device_of(queries):
        triton_search.best_sub_keys[(triton.cdiv(tokens, _TOKENS * size), 2 * heads)](
            queries,
            sub_keys,
            best,
            tokens,
            heads,
            keys,
            half,
            k,
            PRECISION=precision,
            # The interpreter would multiply the bits of bf16 as whole numbers.
            PARTS=tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
            TOKENS=_TOKENS * size,
            KEYS=max(_KEYS, width),
            # Parts of both take twice the registers.
            WIDTH=_WIDTH // 2 if precision == "bf16x3" else _WIDTH,
            K=width,
            num_warps=4 * size,
        )
        bags = 8 if pairs <= 128 else 2
        triton_search.best_pairs[(triton.cdiv(tokens * heads, bags),)](
            best,
            ranks,
            found[1].view(torch.float32),
            found[0],
            tokens * heads,
            keys,
            k,
            pairs,
            WEIGHTING=weighting,
            BAGS=bags,
            PAIRS=max(width, _power(pairs)),
            K=width,
            num_warps=4,
        )
    return found


def gradients(
    queries: Tensor,
    sub_keys: Tensor,
    rows: Tensor,
    weights: Tensor,
    upstream: Tensor,
    weighting: str,
    wanted: Sequence[bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of queries and sub-keys, each of its tensor's shape and dtype, or None
    where they are not wanted, from that of the weights [tokens, heads, k].

    rows, weights: what `look_up` returned. Sums are formed in fp32, without atomics: equal calls
    give equal bits.
    """
    queries, sub_keys, upstream = (x.contiguous() for x in (queries, sub_keys, upstream))
    (tokens, heads, k), (_, _, keys, half) = rows.shape, sub_keys.shape
    if not tokens:
        return torch.zeros_like(queries), torch.zeros_like(sub_keys)
    # Half as many digits to sort where sub-keys have numbers of 16 bits.
    number = torch.int16 if 2 * heads * keys < 2**15 else torch.int32
    read = queries.new_empty(tokens * heads * 2 * k, dtype=number)
    slopes = queries.new_empty(len(read), dtype=torch.float32)
    firsts, lasts = queries.new_empty(2, tokens * heads * 2, dtype=torch.int64)
    width = _power(k)
    # K x K comparisons for each bag of a program: 2,048 at least, 4,096 at most.
    bags = max(1, 2048 // width**2)
    with torch.cuda.device_of(queries):
        triton_search_gradient.merge_reads[(triton.cdiv(tokens * heads, bags),)](
            rows,
            weights,
            upstream,
            read,
            slopes,
            firsts,
            lasts,
            tokens * heads,
            heads,
            keys,
            k,
            WEIGHTING=weighting,
            BAGS=bags,
            K=width,
            num_warps=4,
        )
    to_queries = to_sub_keys = None
    if wanted[0]:
        sums = triton_rows.bag_sums(sub_keys.view(-1, half), read, slopes, firsts, lasts)
        to_queries = sums.view(queries.shape).to(queries.dtype)
    if wanted[1]:
        # A stable sort: a sub-key's gradient is summed over the tokens in their order.
        ascending, order = torch.sort(read, stable=True)
        numbers = torch.arange(2 * heads * keys + 1, dtype=number, device=read.device)
        sums = triton_rows.segment_sums(
            queries.view(-1, half),
            order // k,
            slopes[order],
            torch.searchsorted(ascending, numbers),
        )
        to_sub_keys = sums.view(sub_keys.shape).to(sub_keys.dtype)
    return to_queries, to_sub_keys


@cache
def _ranks(k: int, device: torch.device) -> Tensor:
    """Return `candidate_pairs` on a device, [2, pairs] int32: copied once, not in every pass."""
    return torch.stack(candidate_pairs(k, device)).int()


def _power(number: int) -> int:
    """Return the lowest power of two from a number on, at least 2: Triton sorts no single ones."""
    return max(2, int(triton.next_power_of_2(number)))
