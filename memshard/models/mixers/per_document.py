"""Causal attention inside documents, one document after the other, in memory that grows with the
length and not with its square.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memshard.models.context import Context

# Up to this length one fused call with a [batch, 1, length, length] mask (16 MB a row at 4096); for
# longer texts one call for each document.
DENSE_LENGTH = 4096


def attend_per_document(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    """Return the attention of each token to itself and earlier tokens of its document, like q.

    q: [batch, heads, length, head dim]; k, v: the same, or with fewer heads, each for a group of
    neighbouring query heads. Padding counts as a separate document, so tokens after padding do not
    see those before it.
    """
    # A call for each document: no mask, and no work on pairs of different documents.
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
