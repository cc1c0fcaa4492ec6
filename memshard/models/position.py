"""How positions enter the model."""

import torch
from torch import Tensor


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Fixed position features (Vaswani et al. 2017, section 3.5). positions: [...] int64; returns [..., dim] fp32."""
    frequencies = _frequencies((dim + 1) // 2, positions.device)
    angles = positions[..., None].float() * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :dim]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Turn channel pairs (i, i + dim/2) by angles that grow with position (RoPE, Su et al. 2021, eq. 34).

    x: [batch, heads, length, dim], dim even; positions: [batch, length] int64. Angles in fp32.
    """
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None].float() * _frequencies(half, x.device)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _frequencies(count: int, device: torch.device) -> Tensor:
    return 10_000.0 ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
