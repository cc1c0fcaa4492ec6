"""Steps read ahead by worker processes, for raw text, whose tokenizer training would wait for."""

from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from memshard.data_pipeline.stream.batch import Batch
from memshard.data_pipeline.stream.open_stream import AnyStream
from memshard.data_pipeline.stream.rank_share import rank_share


class _Steps(Dataset[list[Batch]]):
    def __init__(self, stream: AnyStream, share: tuple[int, int, int, int | None]) -> None:
        self._stream, self._share = stream, share

    def __getitem__(self, step: int) -> list[Batch]:
        return rank_share(self._stream, step, *self._share)


def prefetched(
    stream: AnyStream,
    first: int,
    last: int,
    batch: int,
    rank: int,
    ranks: int,
    micro_batch: int | None,
    workers: int,
) -> Iterator[list[Batch]]:
    """Yield `rank_share` of steps first to last - 1, in order. Workers have no state, so their
    number changes nothing.
    """
    steps = _Steps(stream, (batch, rank, ranks, micro_batch))
    return iter(DataLoader(steps, batch_size=None, sampler=range(first, last), num_workers=workers))
