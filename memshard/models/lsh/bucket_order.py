"""The order that puts the tokens of one group next to each other, earliest first."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """One round's order of the tokens of N rows of length L, in P places: an empty chunk, then each
    row filled up to whole chunks.

    places: [P] int64, the token in each place, as a number below N L; N L for empty places. tokens:
    the same, but with an arbitrary valid number for empty places. groups: [P] int32, ascending and
    different in each row; -1 for empty places. codes: [N L + 1] int32, such that for w <= window,
    token i is one of the w tokens after token j in its group exactly if 0 < codes_i - codes_j <= w.
    """

    places: Tensor
    tokens: Tensor
    groups: Tensor
    codes: Tensor


def order_tokens(groups: Tensor, window: int, chunk: int) -> Order:
    """Sort tokens by (group, position). groups: [N, L] int64. window: the largest distance in a
    group that codes express.
    """
    rows, length = groups.shape
    device = groups.device
    ordered, order = groups.sort(dim=1, stable=True)
    row = torch.arange(rows, device=device)[:, None]
    changes = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    # Counted on from row to row, so that groups of different rows, which are
    # neighbours here, differ.
    numbers = changes.flatten().cumsum(0, dtype=torch.int32).view(rows, length)
    # With gaps of `window` between groups, one subtraction compares group and distance.
    gapped = (
        torch.arange(rows * length, device=device, dtype=torch.int32).view(rows, length)
        + numbers * window
    )
    places = order + row * length
    codes = torch.zeros(rows * length + 1, dtype=torch.int32, device=device).index_copy_(
        0, places.flatten(), gapped.flatten()
    )
    # The empty chunk in front gives the first real one a predecessor to look back at.
    missing, empty = -length % chunk, rows * length
    if missing:
        places, numbers = (
            F.pad(x, (0, missing), value=value) for x, value in ((places, empty), (numbers, -1))
        )
    places, numbers = (
        F.pad(x.flatten(), (chunk, 0), value=value) for x, value in ((places, empty), (numbers, -1))
    )
    return Order(places, places.clamp(max=empty - 1), numbers, codes)
