"""The matrices of the dense trunk."""

from torch import Tensor, nn

INIT_STD = 0.02


class Projection(nn.Linear):
    """A linear map without bias, drawn from N(0, (0.02 * scale)^2).

    scale: 1 / sqrt(2 * layers) for maps that write to the residual stream (GPT-2), so its variance
    does not grow with depth.
    """

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        self.init_scale = scale
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weight."""
        nn.init.normal_(self.weight, std=INIT_STD * self.init_scale)

    @staticmethod
    def summed(y: Tensor) -> Tensor:
        """The result, from products with `weight` that were taken elsewhere."""
        return y


class TokenEmbedding(nn.Embedding):
    """An embedding drawn from N(0, 0.02^2), so that it can serve as output head too."""

    def reset_parameters(self) -> None:
        """Draw the weight."""
        nn.init.normal_(self.weight, std=INIT_STD)

    def logits(self, x: Tensor) -> Tensor:
        """Inner products with every embedding. x: [..., dim]; returns [..., vocabulary]."""
        return nn.functional.linear(x, self.weight)
