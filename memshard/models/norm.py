"""Normalisation of the residual stream."""

from torch import nn


def build_norm(kind: str, dim: int) -> nn.Module:
    """kind: "layer" (LayerNorm) or "rms" (RMSNorm), both with a learned scale over the last dim."""
    return nn.LayerNorm(dim) if kind == "layer" else nn.RMSNorm(dim, eps=1e-6)
