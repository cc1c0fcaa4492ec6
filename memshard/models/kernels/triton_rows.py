"""The row backend of GPUs: how the Triton kernels are launched. Nothing here waits for the device.

With TRITON_INTERPRET=1 they run on CPU tensors, slowly, for tests.
"""

import os

import torch
import triton
from torch import Tensor

from memshard.models.kernels import plain_rows, triton_adam, triton_reads
from memshard.models.kernels.plain_rows import AdamUpdate

device_type = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

# Columns of a program; wider rows take several.
_WIDEST = 1024
# Reads whose rows are loaded together; with fewer, memory would wait for arithmetic.
_TILE = 8
_UPDATE_TILE = 4
_WINDOW = 256
"""Reads of one row that a program sums alone; of a hot row, which may have tens of thousands, each
such window is a program.
"""

sort_reads = plain_rows.sort_reads_on_device


def gather_sum(values: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Do what `plain_rows.gather_sum` does; a row that is not in the table makes its bag NaN."""
    if plain_rows.needed_for(values, weights, device_type):
        return plain_rows.gather_sum(values, rows, weights, offsets)
    lasts = offsets[1:]
    return bag_sums(
        values.contiguous(),
        rows.contiguous(),
        weights.contiguous(),
        offsets.contiguous(),
        lasts.contiguous(),
    )


def score_gradients(values: Tensor, rows: Tensor, offsets: Tensor, upstream: Tensor) -> Tensor:
    """Do what `plain_rows.score_gradients` does; the result is fp32."""
    out = upstream.new_empty(len(rows), dtype=torch.float32)
    narrow = upstream.dtype in plain_rows.KERNEL_DTYPES
    if not narrow or plain_rows.needed_for(values, out, device_type):
        return plain_rows.score_gradients(values, rows, offsets, upstream)
    values, rows, offsets, upstream = (
        values.contiguous(),
        rows.contiguous(),
        offsets.contiguous(),
        upstream.contiguous(),
    )
    (slots, dim), lasts = values.shape, offsets[1:]
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
                # 8 columns a thread: one load of 16 bytes from an fp16 table.
                num_warps=max(1, width // 256),
            )
    return out


def segment_sums(values: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Do what `plain_rows.segment_sums` does."""
    if plain_rows.needed_for(values, weights, device_type):
        return plain_rows.segment_sums(values, rows, weights, starts)
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
                # 4 columns a thread: one load of 16 bytes from the fp32 gradients.
                num_warps=max(1, width // 128),
            )
    return out


def adam_rows(update: AdamUpdate) -> None:
    """Do what `plain_rows.adam_rows` does, in one pass: a program sums a gradient and updates
    its row.
    """
    if plain_rows.needed_for_update(update, device_type):
        return plain_rows.adam_rows(update)
    values, upstream = update.values, update.upstream.contiguous()
    bags, weights = update.bags.to(torch.int32).contiguous(), update.weights.contiguous()
    starts = update.starts.contiguous()
    (slots, dim), width = values.shape, _width(values.shape[1])
    if not len(update.rows):
        return None
    with torch.cuda.device_of(values):
        triton_adam.adam_rows[(len(update.rows), triton.cdiv(dim, width))](
            values=values,
            exp_avg=update.exp_avg,
            exp_avg_sq=update.exp_avg_sq,
            master=update.master,
            rows=update.rows.contiguous(),
            starts=starts,
            bags=bags,
            weights=weights,
            upstream=upstream,
            windows=_windows(upstream, bags, weights, starts),
            step_sizes=_contiguous(update.step_sizes),
            decay1=_contiguous(update.decay1),
            decay2=_contiguous(update.decay2),
            slots=slots,
            tokens=len(upstream),
            dim=dim,
            first_row=update.first_row,
            first_column=update.first_column,
            key=update.key,
            beta2=update.beta2,
            # Formed in fp64: 1 - beta2 has few digits left in fp32.
            rest1=1 - update.beta1,
            rest2=1 - update.beta2,
            eps=update.eps,
            step_size=update.step_size,
            WINDOW=_WINDOW,
            TILE=_UPDATE_TILE,
            WIDTH=width,
            num_warps=max(1, width // 128),
            **_registers(values),
        )
    return None


def _registers(values: Tensor) -> dict[str, int]:
    """Return the limit of registers for `adam_rows`, as an option of its launch."""
    # It takes 66 otherwise; with 64 a fourth row fits on each multiprocessor, without spilling.
    # Code for older GPUs would spill 80 to 96 bytes.
    old = values.is_cuda and torch.cuda.get_device_capability(values.device) < (8, 0)
    return {} if old else {"maxnreg": 64}


def bag_sums(
    values: Tensor, rows: Tensor, weights: Tensor, firsts: Tensor, lasts: Tensor
) -> Tensor:
    """Return the sums of reads firsts[i] <= j < lasts[i], to the end where `lasts` is shorter."""
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
    """Return the sum of each window of reads inside one segment, [reads // window, dim].

    Windows that cross a border get nothing: nobody reads them.
    """
    (slots, dim), width = values.shape, _width(values.shape[1])
    # As many windows as reads allow, without asking the device how many there are.
    out = weights.new_empty(len(rows) // _WINDOW, dim)
    if len(out):
        with torch.cuda.device_of(values):
            triton_reads.window_sums[(len(out), triton.cdiv(dim, width))](
                values,
                rows,
                weights,
                starts,
                len(starts),
                out,
                slots,
                dim,
                WINDOW=_WINDOW,
                TILE=_TILE,
                WIDTH=width,
                num_warps=max(1, width // 256),
            )
    return out


def _width(dim: int) -> int:
    """Return the number of columns of a program, a power of two."""
    return min(int(triton.next_power_of_2(dim)), _WIDEST)


def _contiguous(by_row: Tensor | None) -> Tensor | None:
    return None if by_row is None else by_row.contiguous()
