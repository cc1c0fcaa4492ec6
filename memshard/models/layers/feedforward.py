"""The position-wise network."""

import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.layers.linear import Projection, cast_once
from memshard.models.layers.squared_relu import squared_relu


class FeedForward(nn.Module):
    """Compute down(f(up(x))), where f is ReLU, GELU, its approximation by tanh, or squared ReLU
    (Primer); or SwiGLU: down(silu(gate(x)) * up(x)).

    hidden: width. Default: 4 x dim, or 8/3 x dim for SwiGLU, which makes up for its third matrix.
    """

    column_parallel = ("up", "gate")
    """Names of the matrices whose outputs are hidden channels."""
    row_parallel = ("down",)
    """Names of the matrices whose inputs are hidden channels."""

    def __init__(
        self,
        dim: int,
        activation: str = "gelu_tanh",
        hidden: int | None = None,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        hidden = hidden or (dim * 8 // 3 if activation == "swiglu" else dim * 4)
        self.activation = activation
        self.up = Projection(dim, hidden)
        self.gate = Projection(dim, hidden) if activation == "swiglu" else None
        self.down = Projection(hidden, dim, scale=output_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape as x: [..., dim]."""
        x = cast_once(x)
        h = self.up(x)
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * h)
        if self.activation in ("gelu", "gelu_tanh"):
            approximate = "tanh" if self.activation == "gelu_tanh" else "none"
            return self.down(F.gelu(h, approximate=approximate))
        return self.down(squared_relu(h) if self.activation == "squared_relu" else F.relu(h))
