"""Position embeddings and features, and rotary positions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memshard.models.layers.linear import TokenEmbedding


class AxialPositions(nn.Module):
    """Learned positions with few rows (Reformer): a position is written in mixed radix, and each
    digit looks up some of the channels.

    lengths: of the axes, most significant first; their product is the longest sequence. Channels
    are shared evenly between the axes; the first axes take the remainder.
    """

    def __init__(self, lengths: Sequence[int], dim: int) -> None:
        super().__init__()
        part, more = divmod(dim, len(lengths))
        self.lengths = tuple(lengths)
        self.axes = nn.ModuleList(
            TokenEmbedding(length, part + (axis < more)) for axis, length in enumerate(lengths)
        )

    def forward(self, positions: Tensor) -> Tensor:
        """Return [..., dim]. positions: [...] int64."""
        digits = []
        for axis, length in zip(reversed(self.axes), reversed(self.lengths), strict=True):
            digits.append(axis(positions % length))
            positions = positions // length
        return torch.cat(digits[::-1], dim=-1)


def near_square(length: int) -> tuple[int, int]:
    """Return two axes, the second a power of 2 near the root, for at least `length` positions."""
    second = 1 << (length.bit_length() // 2)
    return math.ceil(length / second), second


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Return fixed position features, [..., dim] fp32 (Vaswani et al. 2017, section 3.5).
    positions: [...] int64.
    """
    frequencies = _frequencies((dim + 1) // 2, positions.device)
    angles = positions[..., None].float() * frequencies
    # Cut at the end: an odd width has a sine more than cosines.
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :dim]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + dim/2) by angles that grow with position (RoPE, Su et al. 2021,
    equation 34).

    x: [batch, heads, length, dim], dim even; positions: [batch, length] int64. Angles in fp32.
    """
    half = x.shape[-1] // 2
    # In bf16, positions above 256 would be rounded.
    angles = positions[:, None, :, None].float() * _frequencies(half, x.device)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _frequencies(count: int, device: torch.device) -> Tensor:
    return 10_000.0 ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
