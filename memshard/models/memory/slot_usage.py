"""Measure how much of a table is used, and how evenly (Lample et al. 2019, section 4.3)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memshard.models.memory.table import ValueTable


@dataclass(frozen=True)
class UsageReport:
    """Statistics of the reads of a table's slots.

    usage: share of slots read at all; kl_weighted, kl_count: KL divergence of the distribution of
    reads from the uniform one, in nats, by softmax weight and by count; reads_per_slot: to judge
    usage by, which grows with the amount of text; gini: Gini coefficient of the counts (0: all
    slots alike, towards 1: one takes all); top50, top90, top99: the fewest slots that take 50, 90
    and 99 % of the reads.
    """

    usage: float
    kl_weighted: float
    kl_count: float
    reads_per_slot: float
    gini: float
    top50: int
    top90: int
    top99: int


class UsageCounter:
    """Sum softmax weights and count reads of every local row, in fp64: fp32 counts stop at 2^24."""

    def __init__(self, table: ValueTable) -> None:
        self.table = table
        self.weights = torch.zeros(
            table.local_row_count, dtype=torch.float64, device=table.weight.device
        )
        self.counts = torch.zeros_like(self.weights)

    def on_read(self, rows: Tensor, weights: Tensor, counts: Tensor | None = None) -> None:
        """Count reads. rows: [reads] integers; weights: [reads], each the sum of `counts` reads.

        Weights of PEER may be negative: their magnitude counts.
        """
        rows, weights = rows.to(self.weights.device), weights.to(self.weights.device)
        counts = None if counts is None else counts.to(self.weights.device)
        self.weights.index_add_(0, rows, weights.double().abs())
        self.counts.index_add_(
            0,
            rows,
            torch.ones_like(weights, dtype=torch.float64) if counts is None else counts.double(),
        )

    def merge(self, add: Callable[[Tensor], Tensor]) -> None:
        """Add the counts of other ranks for the same rows. add: sums a tensor over these ranks."""
        self.weights, self.counts = add(self.weights), add(self.counts)

    def report(
        self,
        reduce: Callable[[Tensor], Tensor] = lambda x: x,
        gather: Callable[[Tensor], list[Tensor]] = lambda x: [x],
    ) -> UsageReport:
        """Return the report over all rows.

        reduce: sums a tensor over the ranks that store the other rows; gather: collects the tensors
        of those ranks, of any length.
        """
        parts = [self._local_parts(self.weights), self._local_parts(self.counts)]
        (weight_total, weight_entropy, _), (reads, count_entropy, used) = reduce(
            torch.stack(parts)
        ).tolist()
        slots = self.table.slots
        return UsageReport(
            usage=used / slots,
            kl_weighted=_divergence(weight_total, weight_entropy, slots),
            kl_count=_divergence(reads, count_entropy, slots),
            reads_per_slot=reads / slots,
            **_concentration(torch.cat(gather(_histogram(self.counts)))),
        )

    @staticmethod
    def _local_parts(sums: Tensor) -> Tensor:
        """Return sum c, sum c log c and the number of non-zero c, which ranks can add up."""
        return torch.stack(
            # xlogy: 0 log 0 is 0, not NaN.
            (sums.sum(), torch.special.xlogy(sums, sums).sum(), (sums > 0).sum().double())
        )


def _divergence(total: float, weighted_log: float, slots: int) -> float:
    """Return log N + sum p log p with p = c / total, from sum c and sum c log c."""
    if total == 0:
        return 0.0
    return (
        torch.tensor(slots * 1.0, dtype=torch.float64) / total
    ).log().item() + weighted_log / total


def _histogram(counts: Tensor) -> Tensor:
    """Return [distinct counts, 2]: each count of reads, and how many slots have it."""
    values, slots = torch.unique(counts, return_counts=True)
    return torch.stack((values, slots.double()), dim=1)


def _concentration(histogram: Tensor) -> dict[str, Any]:
    """Return Gini coefficient and top slots, from (count, slots that have it), fp64."""
    ascending = histogram[histogram[:, 0].argsort()]
    value, slots = ascending.unbind(1)
    reads = value * slots
    total, all_slots = float(reads.sum()), float(slots.sum())
    if not total:
        return {"gini": 0.0, "top50": 0, "top90": 0, "top99": 0}
    # sum of rank x value over slots in ascending order; a group of equal counts has ranks before +
    # 1 to before + slots
    before = slots.cumsum(0) - slots
    ranked = float((value * slots * (before + (slots + 1) / 2)).sum())
    # G = 2 sum_i i x_i / (n sum_i x_i) - (n + 1) / n, over the counts x in ascending order.
    gini = 2 * ranked / (all_slots * total) - (all_slots + 1) / all_slots
    value, slots, reads = value.flip(0), slots.flip(0), reads.flip(0)
    taken = reads.cumsum(0)
    top = {}
    for percent in (50, 90, 99):
        wanted = total * percent / 100
        # The margins keep rounding in fp64 from adding a slot to an exact share.
        group = int((taken < wanted * (1 - 1e-12)).sum())
        left = wanted - float(taken[group] - reads[group])
        top[f"top{percent}"] = int(slots[:group].sum()) + math.ceil(
            left / float(value[group]) - 1e-9
        )
    return {"gini": max(gini, 0.0), **top}
