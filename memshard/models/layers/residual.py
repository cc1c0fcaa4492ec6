"""How a branch joins the residual stream."""

from torch import Tensor, nn

from memshard.models.layers.norm import build_norm


class Residual(nn.Module):
    """join(x, after(f(before(x)))) of a branch f: x + f(norm(x)) for kind "pre", norm(x + f(x)) for
    "post". With `behind` the norm of "pre" stands behind the branch, x + norm(f(x)) (Primer's
    feedforwards). Of a reversible block's residual `join` is not used.

    kind: "pre", "post", "reversible", or "whole" for a branch that is a block by itself, f(x);
    norm: as in `build_norm`.
    """

    def __init__(self, kind: str, norm: str, dim: int, behind: bool = False) -> None:
        super().__init__()
        self.kind, self.behind = kind, behind
        self.norm = nn.Identity() if kind == "whole" else build_norm(norm, dim)

    @property
    def first(self) -> nn.Module | None:
        """The norm that stands before the branch, if there is one."""
        return None if self.kind == "post" or self.behind else self.norm

    def before(self, x: Tensor) -> Tensor:
        """What the branch gets. x: [..., dim]."""
        return x if self.first is None else self.first(x)

    def after(self, y: Tensor) -> Tensor:
        """What joins the stream, but for dropout, of what the branch gives. y: [..., dim]."""
        return self.norm(y) if self.behind else y

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream after it."""
        if self.kind == "whole":
            return y
        return self.norm(x + y) if self.kind == "post" else x + y
