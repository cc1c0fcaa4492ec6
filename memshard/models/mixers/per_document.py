"""Causal attention inside documents, one after the other: memory grows with the length and not with
its square.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.context import Context

# Up to here one fused call with a [batch, 1, length, length] mask; beyond, a call for every
# document.
DENSE_LENGTH = 4096


def attend_per_document(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    """Attention of each token to itself and those before it in its document; q: [batch, heads,
    length, head dim], k and v too, or of fewer heads, each for a group of neighbours.

    Padding counts as a document of its own, so what follows padding does not see what precedes it.
    """
    rows = []
    for row, sizes in enumerate(ctx.document_sizes):
        queries, keys, values = (tensor[row : row + 1].split(sizes, dim=2) for tensor in (q, k, v))
        parts = [
            F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=q.shape[1] > k.shape[1]
            )
            for query, key, value in zip(queries, keys, values, strict=True)
        ]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)
