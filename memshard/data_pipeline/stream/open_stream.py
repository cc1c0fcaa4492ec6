"""Open the stream that fits the records of a data folder."""

from collections.abc import Mapping

from memshard.data_pipeline.format.index import load_index
from memshard.data_pipeline.format.kinds import Order
from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.mixture import MixtureStream
from memshard.data_pipeline.stream.reader import TOLERANCE
from memshard.data_pipeline.stream.records import HeldOutRecords, RecordStream
from memshard.data_pipeline.stream.train_stream import TrainStream

DEFAULT_ORDER: Order = "shuffled"
AnyStream = TrainStream | RecordStream | MixtureStream


def open_train(
    path: str,
    length: int,
    batch: int,
    seed: int,
    tolerance: float = TOLERANCE,
    mixture: Mapping[str, float] | None = None,
    by_epochs: bool = False,
    order: Order = "auto",
) -> AnyStream:
    """Return the training stream of a folder, or of the folders of a mixture (path -> share, or
    number of epochs with `by_epochs`). batch: sequences or records a step. order: of sequences, see
    `resolve_order`.
    """
    order = resolve_order(path, order, mixture)
    if mixture:
        streams = [TrainStream(folder, length, batch, seed, tolerance, order) for folder in mixture]
        return MixtureStream(streams, list(mixture.values()), seed, by_epochs)
    if order == "auto":
        return RecordStream(path, length, batch, seed, tolerance)
    return TrainStream(path, length, batch, seed, tolerance, order)


def resolve_order(
    path: str, order: Order, mixture: Mapping[str, float] | None = None, carry_state: bool = False
) -> Order:
    """Return the order that data.order means for the sequences of a folder or a mixture: one of
    ORDERS for texts, "auto" for records, whose order is their own. ValueError if it does not fit.
    carry_state: rows have to go on where those of the step before ended.
    """
    if mixture or load_index(path).records.packed:
        default: Order = "contiguous" if carry_state else DEFAULT_ORDER
        return default if order == "auto" else order
    if order != "auto":
        raise ValueError(
            f"data.order is {order}, and {path} holds whole records, which have an order of their "
            "own: leave it out"
        )
    return "auto"


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
