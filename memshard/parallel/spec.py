"""Where the pieces of a tensor live."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardSpec:
    """A tensor split along `dim` over the ranks of a mesh axis, in contiguous pieces as `torch.chunk` cuts them."""

    dim: int
    axis: str
