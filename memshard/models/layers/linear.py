"""Linear maps and embeddings of the dense trunk, and how they are initialised."""

import torch
from torch import Tensor, nn

INIT_STD = 0.02


def cast_once(x: Tensor) -> Tensor:
    """Return x in autocast's dtype where that is on, for products that would each cast it anew."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


class Projection(nn.Linear):
    """A linear map without bias, initialised from N(0, (0.02 * scale)^2).

    scale: 1 / sqrt(2 * layers) for maps that write to the residual stream (GPT-2), so that its
    variance does not grow with depth.
    """

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        self.init_scale = scale
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weight."""
        # On meta there is nothing to draw, for which torch takes three quarters of a model's time.
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=INIT_STD * self.init_scale)

    @staticmethod
    def summed(y: Tensor) -> Tensor:
        """Return the layer's output from products with `weight` that the caller computed. Layers
        split over ranks sum here.
        """
        return y


class TokenEmbedding(nn.Embedding):
    """An embedding initialised from N(0, 0.02^2), small enough to serve as output head as well."""

    def reset_parameters(self) -> None:
        """Draw the weight."""
        nn.init.normal_(self.weight, std=INIT_STD)

    def logits(self, x: Tensor) -> Tensor:
        """Return the inner products with every embedding, [..., vocabulary]. x: [..., dim]."""
        return nn.functional.linear(x, self.weight)
