"""Layers that product-key memories are compared with: flat keys (Lample et al. 2019, table 5) and
a mixture of experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memshard.models.config import ModelConfig
from memshard.models.kernels.plain_topk import ranked_topk
from memshard.models.layers.feedforward import FeedForward
from memshard.models.layers.linear import Projection
from memshard.models.memory.kinds import QueryNormKind
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.recompute.replay import Replay
from memshard.models.transformer import Transformer

_BIAS_STEP = 1e-3


class FlatKeyMemory(ProductKeyMemory):
    """A memory with a separate key for every slot: a query is compared with all of them.

    Takes the arguments of `ProductKeyMemory`.
    """

    def __init__(
        self,
        dim: int,
        keys: int,
        heads: int,
        topk: int,
        key_dim: int,
        query_norm: QueryNormKind = "batch",
    ) -> None:
        super().__init__(dim, keys, heads, topk, key_dim, query_norm=query_norm)
        del self.sub_keys
        self.flat_keys = _FlatKeys(heads, keys**2, key_dim)

    def lookup(self, tokens: Tensor, replay: Replay | None = None) -> tuple[Tensor, Tensor]:
        """Return rows and weights as `ProductKeyMemory.lookup` does; a key's number is its row."""
        z = self.query(tokens).unflatten(-1, (self.heads, -1))
        # fp32: rounded to 8 bits, neighbours among thousands of scores would be equal and the order
        # of ties would choose.
        with torch.autocast(tokens.device.type, enabled=False):
            scores = torch.einsum("thd,hnd->thn", self.query_norm(z, replay), self.flat_keys.weight)
            # Ties by the lowest number, on every device alike: torch.topk leaves their order open.
            rows = ranked_topk(scores.detach(), self.topk)
            weights = scores.gather(-1, rows).softmax(-1)
        return rows.flatten(1), weights.flatten(1)


class _FlatKeys(nn.Module):
    """Keys: weight [heads, slots, key_dim], from U(-1/sqrt(key_dim), 1/sqrt(key_dim))."""

    def __init__(self, heads: int, slots: int, key_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, slots, key_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the keys."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)


class MixtureOfExperts(nn.Module):
    """Send each token to the `active` experts with the highest sigmoid(router . x), which also
    weighs them. Experts are feedforwards of width 4 x dim.

    No token is dropped. The load is balanced without an auxiliary loss: a bias, which only the
    choice of experts sees, falls by 0.001 a step for an expert with more than its share of the
    tokens and rises for the others (Wang et al. 2024, arXiv 2408.15664).
    """

    bias: Tensor

    def __init__(
        self,
        dim: int,
        experts: int,
        active: int,
        activation: str = "gelu_tanh",
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.active = active
        self.router = Projection(dim, experts)
        self.experts = nn.ModuleList(
            FeedForward(dim, activation, None, output_scale) for _ in range(experts)
        )
        self.register_buffer("bias", torch.empty(experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all biases to zero."""
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the experts' weighted sum. x: [..., dim], as the output."""
        tokens = x.reshape(-1, x.shape[-1])
        # Sigmoids, not a softmax: over 32 experts that would begin with a thirtieth of
        # each one's output.
        gates = self.router(tokens).float().sigmoid()
        chosen = (gates.detach() + self.bias).topk(self.active).indices
        load = chosen.flatten().bincount(minlength=len(self.experts))
        if self.training:
            # A sign, not a share: an overloaded expert becomes less attractive by the same small
            # amount in each step, whatever the load.
            self.bias += _BIAS_STEP * (load.float().mean() - load).sign()
        order = chosen.flatten().argsort()
        # Sorted by expert, each expert's tokens are one slice: one matrix product an expert.
        places = order // self.active
        parts = places.split(load.tolist())
        read = torch.cat(
            [expert(tokens[part]) for expert, part in zip(self.experts, parts, strict=True)]
        )
        # Sigmoids begin at 1/2: scaled like this, the active experts begin as one feedforward.
        weighted = read * (2 / self.active * gates.gather(1, chosen).flatten()[order, None])
        return (
            torch.zeros_like(tokens, dtype=weighted.dtype)
            .index_add(0, places, weighted)
            .view(x.shape)
        )


def _flat_keys(config: ModelConfig) -> Transformer:
    model, memory = Transformer(config), config.memory
    for layer in memory.layers:
        flat = FlatKeyMemory(
            config.dim, memory.keys, memory.heads, memory.topk, memory.key_dim, memory.query_norm
        )
        model.blocks[layer].memory = flat
    return model


def _experts(config: ModelConfig, active: int) -> Transformer:
    """Replace each memory by as many experts as have the parameters of its table."""
    # A table has slots x dim values, an expert two matrices of dim x 4 dim.
    model, experts = Transformer(config), config.memory.slots // (8 * config.dim)
    for layer in config.memory.layers:
        model.blocks[layer].memory = None
        # Scaled like every residual branch of the model, by 1 / sqrt(2 layers).
        mixture = MixtureOfExperts(
            config.dim, experts, active, config.feedforward.activation, (2 * config.layers) ** -0.5
        )
        model.blocks[layer].feedforward = mixture
    return model


def _equal_operations(config: ModelConfig) -> Transformer:
    """Replace each memory by a feedforward with as many multiplications.

    A memory multiplies for the query, the scores and the reads; a feedforward 2 dim hidden times.
    """
    model, memory = Transformer(config), config.memory
    hidden = (
        memory.heads
        * (memory.key_dim * (config.dim + memory.keys) + memory.topk * config.dim)
        // (2 * config.dim)
    )
    for layer in memory.layers:
        model.blocks[layer].memory = None
        narrow = FeedForward(
            config.dim, config.feedforward.activation, hidden, (2 * config.layers) ** -0.5
        )
        model.blocks[layer].feedforward = narrow
    return model


BUILDERS: dict[str, Callable[[ModelConfig], Transformer]] = {
    "transformer": Transformer,
    "flat keys": _flat_keys,
    "feedforward of equal operations": _equal_operations,
    "mixture of experts, 1 active": lambda config: _experts(config, 1),
    "mixture of experts, 2 active": lambda config: _experts(config, 2),
}
"""Who makes the model of a run."""
