"""The order in which tokens of one group stand next to each other, earliest first."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """One round's order of the tokens of N rows of L, behind one empty chunk, each row filled up to
    whole chunks: P places.

    places: [P] int64, the token in each place, as a number below N L, and N L where there is none;
    tokens: the same, but some token's number there. groups: [P] int32, distinct from row to row, in
    ascending order; -1 where no token is. codes: [N L + 1] int32: token i comes at most w tokens of
    its group after token j exactly if 0 < codes_i - codes_j <= w, for w <= window.
    """

    places: Tensor
    tokens: Tensor
    groups: Tensor
    codes: Tensor


def order_tokens(groups: Tensor, window: int, chunk: int) -> Order:
    """Sort tokens by (group, position). groups: [N, L] int64. window: largest distance that codes
    tell apart from infinity.
    """
    rows, length = groups.shape
    device = groups.device
    ordered, order = groups.sort(dim=1, stable=True)
    row = torch.arange(rows, device=device)[:, None]
    changes = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    numbers = changes.flatten().cumsum(0, dtype=torch.int32).view(rows, length)
    # A gap of `window` between groups makes one subtraction tell group and distance.
    spread = (
        torch.arange(rows * length, device=device, dtype=torch.int32).view(rows, length)
        + numbers * window
    )
    places = order + row * length
    codes = torch.zeros(rows * length + 1, dtype=torch.int32, device=device).index_copy_(
        0, places.flatten(), spread.flatten()
    )
    missing, nobody = -length % chunk, rows * length
    places = F.pad(F.pad(places, (0, missing), value=nobody).flatten(), (chunk, 0), value=nobody)
    numbers = F.pad(F.pad(numbers, (0, missing), value=-1).flatten(), (chunk, 0), value=-1)
    return Order(places, places.clamp(max=nobody - 1), numbers, codes)
