"""From token shards to batches, in training and evaluation."""

from memshard.data_pipeline.stream.batch import IGNORE, Batch
from memshard.data_pipeline.stream.held_out import HeldOutStream
from memshard.data_pipeline.stream.train_stream import TrainStream

__all__ = ["IGNORE", "Batch", "HeldOutStream", "TrainStream"]
