"""Triton kernels for reads and row updates: how they are launched. With TRITON_INTERPRET=1 they run
on CPU tensors, slowly.

Nothing here waits for the device.
"""

import torch
import triton
from torch import Tensor

from memshard.models.kernels import plain, triton_adam, triton_reads

_WIDEST = 1024
_TILE = 8
_UPDATE_TILE = 4
_WINDOW = 256
"""Reads of one row that a program sums before others join in: hot rows get tens of thousands, most
get one or two.
"""

sort_reads = plain.sort_reads


def gather_sum(values: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """As `bags.gather_sum`; a row that is not in the table makes its bag NaN."""
    lasts = offsets[1:]
    return _bag_sums(
        values.contiguous(),
        rows.contiguous(),
        weights.contiguous(),
        offsets.contiguous(),
        lasts.contiguous(),
    )


def score_gradients(values: Tensor, rows: Tensor, offsets: Tensor, upstream: Tensor) -> Tensor:
    """As `bags.score_gradients`."""
    values, rows, offsets, upstream = (
        values.contiguous(),
        rows.contiguous(),
        offsets.contiguous(),
        upstream.contiguous(),
    )
    out, (slots, dim), lasts = upstream.new_empty(len(rows)), values.shape, offsets[1:]
    if len(offsets):
        width = _width(dim)
        with torch.cuda.device_of(values):
            triton_reads.score_gradients[(len(offsets),)](
                values,
                rows,
                offsets,
                lasts,
                len(lasts),
                len(rows),
                upstream,
                out,
                slots,
                dim,
                TILE=_TILE,
                WIDTH=width,
                num_warps=max(1, width // 256),
            )
    return out


def segment_sums(values: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """As `bags.segment_sums`."""
    values, rows, weights, starts = (
        values.contiguous(),
        rows.contiguous(),
        weights.contiguous(),
        starts.contiguous(),
    )
    windows, (slots, dim), width = (
        _windows(values, rows, weights, starts),
        values.shape,
        _width(values.shape[1]),
    )
    out = weights.new_empty(len(starts) - 1, dim)
    if len(out):
        with torch.cuda.device_of(values):
            triton_reads.segment_sums[(len(out), triton.cdiv(dim, width))](
                values,
                rows,
                weights,
                windows,
                starts,
                out,
                slots,
                dim,
                WINDOW=_WINDOW,
                TILE=_UPDATE_TILE,
                WIDTH=width,
                num_warps=max(1, width // 128),
            )
    return out


def adam_rows(tensors: dict[str, Tensor | None], numbers: dict[str, float]) -> None:
    """Sum each row's gradient and update it in one pass. tensors, numbers: as
    `CpuKernels.adam_rows` takes them.
    """
    values, upstream, bags, weights, starts = (
        tensors[name] for name in ("values", "upstream", "bags", "weights", "starts")
    )
    assert (
        values is not None
        and upstream is not None
        and bags is not None
        and weights is not None
        and starts is not None
    )
    (slots, dim), count, width = values.shape, int(numbers["count"]), _width(values.shape[1])
    if not count:
        return
    with torch.cuda.device_of(values):
        triton_adam.adam_rows[(count, triton.cdiv(dim, width))](
            **tensors,
            windows=_windows(upstream, bags, weights, starts),
            slots=slots,
            tokens=len(upstream),
            dim=dim,
            rest1=1 - numbers["beta1"],
            rest2=1 - numbers["beta2"],
            **{
                name: numbers[name]
                for name in ("first_row", "first_column", "key", "beta2", "eps", "step_size")
            },
            WINDOW=_WINDOW,
            TILE=_UPDATE_TILE,
            WIDTH=width,
            num_warps=max(1, width // 128),
            # It takes 66 otherwise: a fourth row at a time on each multiprocessor, without
            # spilling.
            maxnreg=64,
        )


def _bag_sums(
    values: Tensor, rows: Tensor, weights: Tensor, firsts: Tensor, lasts: Tensor
) -> Tensor:
    """Sums of the reads firsts[i] <= j < lasts[i], to the end where `lasts` is shorter."""
    (slots, dim), width = values.shape, _width(values.shape[1])
    out = weights.new_empty(len(firsts), dim)
    if len(firsts):
        with torch.cuda.device_of(values):
            triton_reads.gather_sum[(len(firsts), triton.cdiv(dim, width))](
                values,
                rows,
                weights,
                firsts,
                lasts,
                len(lasts),
                len(rows),
                out,
                slots,
                dim,
                TILE=_TILE,
                WIDTH=width,
                num_warps=max(1, width // 256),
            )
    return out


def _windows(values: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """The sum of every window of reads that lies inside one segment; of others, zeros that nobody
    reads. [reads // window, dim]
    """
    firsts = torch.arange(len(rows) // _WINDOW, device=starts.device) * _WINDOW
    segment = torch.searchsorted(starts, firsts, right=True)
    whole = (
        (segment == torch.searchsorted(starts, firsts + (_WINDOW - 1), right=True))
        & (segment > 0)
        & (segment < len(starts))
    )
    return _bag_sums(values, rows, weights, firsts, firsts + whole * _WINDOW)


def _width(dim: int) -> int:
    """Columns of a program: a power of two."""
    return min(triton.next_power_of_2(dim), _WIDEST)
