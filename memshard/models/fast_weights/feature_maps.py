"""Feature maps that make a dot product act like a kernel (Schlag et al. 2021, section 5)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.mixers.kinds import FeatureKind, FeatureNorm, feature_count


def elu_plus_one(x: Tensor) -> Tensor:
    """Return x + 1 above zero and exp(x) below; elu(x) + 1 would cancel to 0 in half precision."""
    y: Tensor = _EluPlusOne.apply(x)
    return y


class _EluPlusOne(torch.autograd.Function):
    """Keeps only its output for backward; `torch.where` would be slower on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu() + x.clamp(max=0).exp_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        # The derivative is 1 above zero, where y > 1, and exp(x) = y below.
        return gradient * y.clamp(max=1)


def dpfp(x: Tensor, nu: int = 1) -> Tensor:
    """Return the deterministic parameter-free projection of x (equation 37): r * roll(r, j) for j =
    1 .. nu, with r = [relu(x), relu(-x)].

    x: [..., d], d even; returns [..., 2 d nu]. Zero for x = 0.
    """
    r = torch.cat((x, -x), -1).relu()
    return torch.cat([r * r.roll(shift, -1) for shift in range(1, nu + 1)], -1)


class FeatureMap(nn.Module):
    """A feature map phi(x) in fp32, normalised.

    kind: elu; dpfp (`width` is nu, D = 2 d nu); favor (FAVOR+ of Choromanski et al. 2021 with
    `width` orthogonal random directions, positive and negative, D = 2 width). normalise: sum scales
    features to add up to 1, which keeps the delta rule stable; l2 to norm 1, so that a write at
    strength 1 is read back exactly.
    """

    def __init__(
        self,
        kind: FeatureKind,
        dim: int,
        width: int = 1,
        normalise: FeatureNorm = "sum",
    ) -> None:
        super().__init__()
        if kind == "dpfp" and dim % 2:
            raise ValueError(
                f"dpfp features of odd width {dim}: keys of alternating signs would have no "
                "features; use an even width"
            )
        self.kind, self.dim, self.width, self.normalise = kind, dim, width, normalise
        self.features = feature_count(kind, dim, width)
        """The width D of phi(x)."""
        self.directions: Tensor | None
        self.register_buffer("directions", torch.empty(width, dim) if kind == "favor" else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw FAVOR+'s directions, orthogonal in blocks of `dim`, with norms of Gaussian vectors.
        They stay fixed in training.
        """
        if self.directions is None or self.directions.is_meta:
            return
        blocks = -(-self.width // self.dim)
        # LAPACK chooses the signs of the columns; features have both signs of each direction, so
        # that does not matter.
        orthogonal, _ = torch.linalg.qr(torch.randn(blocks, self.dim, self.dim))
        norms = torch.randn(self.width, self.dim).norm(dim=-1, keepdim=True)
        self.directions.copy_(orthogonal.mT.flatten(0, 1)[: self.width] * norms)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., features] fp32 (fp64 for fp64). x: [..., dim]."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.kind == "favor":
                return self._favor(x)
            if self.kind == "elu":
                y = elu_plus_one(x)
            else:
                # DPFP is of degree 2 in x, so a factor common to all features cancels in the
                # normalisation. Scaling x by it keeps squares from vanishing and overflowing.
                if self.normalise != "none":
                    x = x / x.abs().amax(-1, keepdim=True).detach().clamp(min=1e-30)
                y = dpfp(x, self.width)
            return self._normalised(y)

    def _favor(self, x: Tensor) -> Tensor:
        assert self.directions is not None
        directions = self.directions.to(x.dtype)
        # Of queries and keys alike, which makes their product the q . k / sqrt(dim)
        # of softmax attention.
        x = x * self.dim**-0.25
        projected = x @ directions.mT
        both = torch.cat((projected, -projected), -1)
        if self.normalise == "none":
            return (both - x.square().sum(-1, keepdim=True) / 2).exp() / self.features**0.5
        # The factor exp(-|x|^2 / 2) cancels in the normalisation. What is left is a softmax, which
        # neither underflows nor overflows.
        shares = both.softmax(-1)
        return shares if self.normalise == "sum" else F.normalize(shares, dim=-1)

    def _normalised(self, y: Tensor) -> Tensor:
        if self.normalise == "none":
            return y
        if self.normalise == "l2":
            return F.normalize(y, dim=-1)
        # The published division by the sum, but for keys that have next to no features.
        return y / y.sum(-1, keepdim=True).clamp(min=1e-6)
