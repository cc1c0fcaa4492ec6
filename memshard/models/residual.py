"""How a branch joins the residual stream."""

from collections.abc import Callable

from torch import Tensor, nn

from memshard.models.norm import build_norm


class Residual(nn.Module):
    """Pre-norm, x + f(norm(x)), or post-norm, norm(x + f(x)). Of a reversible block's residual only the norm is used.

    kind: "pre", "post" or "reversible"; norm: "layer" or "rms".
    """

    def __init__(self, kind: str, norm: str, dim: int) -> None:
        super().__init__()
        self.pre = kind == "pre"
        self.norm = build_norm(norm, dim)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x: [..., dim]; branch keeps that shape."""
        return x + branch(self.norm(x)) if self.pre else self.norm(x + branch(x))
