"""Join the branches of a block to the residual stream."""

from torch import Tensor, nn

from memshard.models.layers.norm import build_norm


class Residual(nn.Module):
    """Joins a branch f to the stream: `join(x, after(f(before(x))))`.

    kind: "pre" gives x + f(norm(x)), "post" norm(x + f(x)). "whole": the branch is a complete block
    and gets no residual, f(x). "reversible": as "pre", but the reversible blocks do the addition
    and never call `join`. norm: as in `build_norm`. norm_after: pre-norm applies the norm to the
    branch's output, x + norm(f(x)) (Primer's feedforwards).
    """

    def __init__(self, kind: str, norm: str, dim: int, norm_after: bool = False) -> None:
        super().__init__()
        self.kind, self.norm_after = kind, norm_after
        self.norm = nn.Identity() if kind == "whole" else build_norm(norm, dim)

    @property
    def norm_before(self) -> nn.Module | None:
        """The norm that the branch's input goes through, if any."""
        return None if self.kind == "post" or self.norm_after else self.norm

    def before(self, x: Tensor) -> Tensor:
        """Return the branch's input. x: [..., dim], the stream."""
        return x if self.norm_before is None else self.norm_before(x)

    def after(self, y: Tensor) -> Tensor:
        """Return what joins the stream, before dropout. y: the branch's output, [..., dim]."""
        return self.norm(y) if self.norm_after else y

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the stream after the branch."""
        if self.kind == "whole":
            return y
        return self.norm(x + y) if self.kind == "post" else x + y
