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


def order_tokens(groups: Tensor, window: int, chunk: int) -> list[Order]:
    """Sort tokens by (group, position), in every round. groups: [N, R, L] int64. window: the
    largest distance in a group that codes express.
    """
    rows, rounds, length = groups.shape
    device = groups.device
    # All rounds at once: on a GPU each would be 15 launches.
    ordered, order = groups.transpose(0, 1).sort(dim=2, stable=True)
    changes = F.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)
    # Counted on from row to row, so that groups of different rows, which are
    # neighbours here, differ.
    numbers = changes.flatten(1).cumsum(1, dtype=torch.int32)
    # With gaps of `window` between groups, one subtraction compares group and distance.
    gapped = torch.arange(rows * length, device=device, dtype=torch.int32) + numbers * window
    places = order + torch.arange(0, rows * length, length, device=device)[:, None]
    codes = torch.zeros(rounds, rows * length + 1, dtype=torch.int32, device=device).scatter_(
        1, places.flatten(1), gapped
    )
    numbers = numbers.view_as(places)
    # The empty chunk in front gives the first real one a predecessor to look back at.
    missing, empty = -length % chunk, rows * length
    if missing:
        places, numbers = (
            F.pad(x, (0, missing), value=value) for x, value in ((places, empty), (numbers, -1))
        )
    places, numbers = (
        F.pad(x.flatten(1), (chunk, 0), value=value)
        for x, value in ((places, empty), (numbers, -1))
    )
    tokens = places.clamp(max=empty - 1)
    return [Order(*parts) for parts in zip(places, tokens, numbers, codes, strict=True)]
