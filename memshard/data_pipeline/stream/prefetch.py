"""Steps read ahead in worker processes, for raw text, where the tokenizer would hold the training
up.
"""

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
    """What `rank_share` gives for steps first to last - 1, in order; workers hold no state, so
    their number changes nothing.
    """
    steps = _Steps(stream, (batch, rank, ranks, micro_batch))
    return iter(DataLoader(steps, batch_size=None, sampler=range(first, last), num_workers=workers))
