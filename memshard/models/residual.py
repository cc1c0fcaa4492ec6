"""How a branch joins the residual stream."""

from collections.abc import Callable

from torch import Tensor, nn

from memshard.models.norm import build_norm


class Residual(nn.Module):
    """Pre-norm, x + f(norm(x)), or post-norm, norm(x + f(x)). Of a reversible block's residual only the norm is used.

    kind: "pre", "post", "reversible", or "whole" for a branch that is a block by itself, f(x); norm: "layer" or "rms".
    """

    def __init__(self, kind: str, norm: str, dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.Identity() if kind == "whole" else build_norm(norm, dim)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x: [..., dim]; branch keeps that shape."""
        if self.kind == "whole":
            return branch(x)
        return x + branch(self.norm(x)) if self.kind == "pre" else self.norm(x + branch(x))
