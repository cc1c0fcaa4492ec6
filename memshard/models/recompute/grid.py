"""The number grid of reversible streams: multiples of a power of two, on which sums are exact.

fp32 has 24 bits: multiples of 2^-14 are all representable below 2^10 = 1024, and sums and
differences of such numbers are exact, so that x = (x + f) - f to the last bit.
"""

from typing import Any

import torch
from torch import Tensor, nn

_BITS = 14
_COARSEST = 2


class Grid(nn.Module):
    """Multiples of 1 / scale, and how near the streams have come to the limit 2^24 / scale, beyond
    which fp32 does not represent them all.

    `scale` is a buffer, 2^14 at first: checkpoints and exports keep it, since it decides the
    model's function.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty(()))
        self.largest: dict[int, Tensor] = {}
        """For each layer, the largest absolute value of its streams since
        `clear`, a device scalar.
        """
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set steps of 2^-14, for streams up to 1024."""
        self.scale.fill_(2.0**_BITS)

    def round(self, x: Tensor) -> Tensor:
        """Round x to the grid, in fp32 at least; the gradient passes unchanged."""
        rounded: Tensor = _Round.apply(x, self.scale)
        return rounded

    @property
    def limit(self) -> Tensor:
        """The value that streams must stay below."""
        return 2.0**24 / self.scale

    def note(self, layer: int, *streams: Tensor) -> None:
        """Remember a layer's largest value. streams: without gradient."""
        if streams[0].numel():
            # Not vector_norm(stream, inf), which takes 12 times as long on CPU.
            largest = torch.stack(
                [torch.maximum(-low, high) for low, high in map(torch.aminmax, streams)]
            ).max()
            self.largest[layer] = (
                torch.maximum(self.largest[layer], largest) if layer in self.largest else largest
            )

    def left_range(self) -> Tensor:
        """Return for each noted layer whether its streams left the range, [layers] bool.

        Values that are not finite do not count: they are another fault.
        """
        largest = (
            torch.stack(list(self.largest.values())) if self.largest else self.scale.new_empty(0)
        )
        return (largest >= self.limit) & largest.isfinite()

    def used_range(self) -> float:
        """Return the largest value as a share of the limit; waits for the device."""
        return max((float(value / self.limit) for value in self.largest.values()), default=0.0)

    def coarsen(self) -> None:
        """Make the grid four times coarser, which quadruples its range; steps never exceed 1/4."""
        self.scale.div_(4).clamp_(min=2.0**_COARSEST)

    def clear(self) -> None:
        """Forget the largest values, when a step begins."""
        self.largest.clear()


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        # Scaling by powers of two is exact, so only round_ changes bits.
        rounded = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
        return rounded.round_().mul_(1 / scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Rounding itself has gradient 0 wherever it has one; on average it is the identity.
        return gradient.to(ctx.dtype), None
