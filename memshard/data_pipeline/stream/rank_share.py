"""A rank's rows of a global batch, in micro-batches of the same number and size on every rank."""

from typing import NamedTuple

import torch
from torch import Tensor

from memshard.data_pipeline.stream.batch import IGNORE, Batch
from memshard.data_pipeline.stream.open_stream import AnyStream


class Pass(NamedTuple):
    """The rows of the global batch that are a rank's micro-batch in one pass. size: with filler."""

    rows: range
    size: int


def deal_rows(batch: int, rank: int, ranks: int, micro_batch: int | None) -> list[Pass]:
    """Return which of `batch` rows each micro-batch of `rank` has, at most `micro_batch` (default:
    all).

    The ranks go through the batch together: their first micro-batches are its first ranks *
    micro_batch rows, contiguous and in the order of ranks. What is computed over the ranks in one
    pass, such as batch statistics, so covers the same rows wherever ranks * micro_batch is the
    same. Only the last pass may have fewer rows; if they do not divide, its last ranks get filler.
    """
    share = -(-batch // ranks)
    together = min(micro_batch or share, share) * ranks
    dealt = []
    for first in range(0, batch, together):
        stop = min(first + together, batch)
        size = -(-(stop - first) // ranks)
        begin = min(first + rank * size, stop)
        dealt.append(Pass(range(begin, min(begin + size, stop)), size))
    return dealt


def rank_share(
    stream: AnyStream, step: int, batch: int, rank: int, ranks: int, micro_batch: int | None
) -> list[Batch]:
    """Return what `rank` of `ranks` trains on in a step of `batch` sequences, dealt by `deal_rows`.
    Filler rows predict nothing.
    """
    batches = []
    for rows, size in deal_rows(batch, rank, ranks, micro_batch):
        # A rank without rows of the batch reads one, to fill it up in the right shape.
        read = stream.batch(step * batch + min(rows.start, batch - 1), max(len(rows), 1))
        batches.append(read if len(rows) == size else _fill(read, len(rows), size))
    return batches


def _fill(rows: Batch, real: int, count: int) -> Batch:
    """Return the first `real` rows, followed by filler up to `count` rows."""

    def extend(field: Tensor, value: int | None) -> Tensor:
        filler = field[:1].expand(count - real, *field.shape[1:])
        return torch.cat(
            (field[:real], filler if value is None else torch.full_like(filler, value))
        )

    return Batch(
        inputs=extend(rows.inputs, None),
        targets=extend(rows.targets, IGNORE),
        documents=extend(rows.documents, None),
        positions=extend(rows.positions, None),
        samples=extend(rows.samples, -1),
    )
