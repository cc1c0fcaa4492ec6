"""Product-key memory as the paper writes it: score all keys^2 slots, sort them, read the best."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.query_norm import QueryNorm


def naive_memory(memory: ProductKeyMemory, x: Tensor) -> Tensor:
    """Return what `memory(x)` must return, from the layer's parameters alone.

    x: [tokens, dim]. No buffer changes.
    """
    heads, _, keys, half = memory.sub_keys.weight.shape
    query = _normalise(
        memory.query_norm,
        F.linear(x, memory.query.weight, memory.query.bias).view(-1, heads, 2 * half),
    )
    first = torch.stack(
        [query[:, h, :half] @ memory.sub_keys.weight[h, 0].T for h in range(heads)], dim=1
    )
    second = torch.stack(
        [query[:, h, half:] @ memory.sub_keys.weight[h, 1].T for h in range(heads)], dim=1
    )
    # Slots are in order of (rank of i1, rank of i2): a stable sort of their sums then gives the
    # documented order of ties.
    order1 = first.argsort(dim=-1, descending=True, stable=True)
    order2 = second.argsort(dim=-1, descending=True, stable=True)
    sums = (
        first.gather(-1, order1)[..., :, None] + second.gather(-1, order2)[..., None, :]
    ).flatten(-2)
    chosen = sums.argsort(dim=-1, descending=True, stable=True)[..., : memory.topk]
    i1, i2 = order1.gather(-1, chosen // keys), order2.gather(-1, chosen % keys)
    scores = sums.gather(-1, chosen)
    if memory.weighting == "softmax":
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    else:
        weights = (
            1 / (1 + (-scores).exp()) if memory.weighting == "sigmoid" else scores.clamp(min=0)
        ) / memory.topk
    storage = torch.tensor([[(a + b) % keys * keys + a for b in range(keys)] for a in range(keys)])
    y = (weights[..., None] * memory.values.weight[storage[i1, i2]]).sum((1, 2))
    if memory.gate is not None and memory.output is not None:
        gate = F.linear(x, memory.gate.weight)
        y = F.linear(y * gate * gate.sigmoid(), memory.output.weight)
    return y


def _normalise(norm: QueryNorm, z: Tensor) -> Tensor:
    if norm.kind == "batch" and norm.training:
        z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
    elif norm.kind in ("batch", "lagged"):
        z = (z - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    elif norm.kind == "layer":
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    elif norm.kind == "layer-half":
        halves = z.unflatten(-1, (2, -1))
        z = (
            (halves - halves.mean(-1, keepdim=True))
            / (halves.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        ).flatten(-2)
    elif norm.kind == "rms":
        z = z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    z = z if norm.weight is None else z * norm.weight
    return z if norm.bias is None else z + norm.bias
