"""Normalisation of the residual stream."""

import torch
from torch import Tensor, nn


class PrimerNorm(nn.Module):
    """Primer's norm (So et al. 2021): (x - mean) / sqrt(mean(x (x - mean)) + 1e-6), times a scale,
    plus a shift.

    mean(x (x - mean)) is the variance, so this is LayerNorm, only less exact where the mean is
    large. Computed in fp32; a variance that rounding makes negative counts as 0.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the scale to 1 and the shift to 0."""
        self.weight.fill_(1)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape and dtype as x: [..., dim]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        variance = (wide * centred).mean(-1, keepdim=True).clamp(min=0)
        return (centred * (variance + 1e-6).rsqrt() * self.weight + self.bias).to(x.dtype)


def build_norm(kind: str, dim: int) -> nn.Module:
    """Return a norm over the last dimension with a learned scale: "layer" (LayerNorm), "rms"
    (RMSNorm) or "primer" (`PrimerNorm`).
    """
    if kind == "primer":
        return PrimerNorm(dim)
    return nn.LayerNorm(dim) if kind == "layer" else nn.RMSNorm(dim, eps=1e-6)
