"""Where the pieces of a tensor live."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardSpec:
    """A tensor whose dim `dim`, of `size` in all, is split over the ranks of mesh axes, in
    contiguous pieces as `torch.chunk` cuts them.

    axes: of the mesh, the last one fastest.
    """

    dim: int
    axes: tuple[str, ...]
    size: int
