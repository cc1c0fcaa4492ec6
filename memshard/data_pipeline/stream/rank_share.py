"""A rank's rows of a global batch, in micro-batches of the same number and size on every rank."""

import torch
from torch import Tensor

from memshard.data_pipeline.stream.batch import IGNORE, Batch
from memshard.data_pipeline.stream.open_stream import AnyStream


def rank_share(
    stream: AnyStream, step: int, batch: int, rank: int, ranks: int, micro_batch: int | None
) -> list[Batch]:
    """Return what `rank` of `ranks` trains on in a step of `batch` sequences, at most `micro_batch`
    at a time (default: all).

    Ranks take contiguous rows, so together they see the same global batch whatever their number. If
    it does not divide, the last ranks get filler rows, which predict nothing.
    """
    share = -(-batch // ranks)
    first = min(rank * share, batch)
    real = min(share, batch - first)
    # A rank without rows of the batch reads one, to fill it up in the right shape.
    rows = stream.batch(step * batch + min(first, batch - 1), max(real, 1))
    if real < share:
        rows = _fill(rows, real, share)
    size = micro_batch or share
    return [
        Batch(*(field[start : start + size] for field in rows)) for start in range(0, share, size)
    ]


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
