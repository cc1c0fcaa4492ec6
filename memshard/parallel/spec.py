"""Where the shards of a tensor are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardSpec:
    """A tensor whose dim `dim`, of global size `size`, is split over the ranks along some axes of
    the mesh, into contiguous shards as `torch.chunk` cuts them.

    axes: ranks along the last one have neighbouring shards.
    """

    dim: int
    axes: tuple[str, ...]
    size: int
