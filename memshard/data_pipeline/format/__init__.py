"""The format of a data folder: WebDataset token shards, sidecars of offsets, index.json."""

from memshard.data_pipeline.format.index import Index, Shard, Split, load_index

__all__ = ["Index", "Shard", "Split", "load_index"]
