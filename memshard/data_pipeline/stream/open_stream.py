"""Open the stream that fits the records of a data folder."""

from collections.abc import Mapping

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.mixture import MixtureStream
from memshard.data_pipeline.stream.reader import TOLERANCE
from memshard.data_pipeline.stream.records import HeldOutRecords, RecordStream
from memshard.data_pipeline.stream.train_stream import TrainStream

AnyStream = TrainStream | RecordStream | MixtureStream


def open_train(
    path: str,
    length: int,
    batch: int,
    seed: int,
    tolerance: float = TOLERANCE,
    mixture: Mapping[str, float] | None = None,
    by_epochs: bool = False,
) -> AnyStream:
    """Return the training stream of a folder, or of the folders of a mixture (path -> share, or
    number of epochs with `by_epochs`). batch: sequences or records a step.
    """
    if mixture:
        streams = [TrainStream(folder, length, batch, seed, tolerance) for folder in mixture]
        return MixtureStream(streams, list(mixture.values()), seed, by_epochs)
    kind = TrainStream if load_index(path).records.packed else RecordStream
    return kind(path, length, batch, seed, tolerance)


def open_held_out(
    path: str, length: int, max_tokens: int | None = None, stride: int | None = None
) -> HeldOutStream | HeldOutRecords:
    """Return the held-out stream of a folder. stride: of windows over text."""
    if load_index(path).records.packed:
        return HeldOutStream(path, length, max_tokens, stride)
    if stride is not None:
        raise ValueError(
            f"{path} holds whole records, which no window slides over: leave out the stride"
        )
    return HeldOutRecords(path, length, max_tokens)
