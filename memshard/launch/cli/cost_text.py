"""Sentences about an estimate that `memshard train` and `memshard plan` both print."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memshard.trainer.cost.estimate import Estimate


def describe_ranks(cost: "Estimate") -> str:
    """Return how the ranks share the work."""
    if cost.tensor_ranks == 1:
        return f"ranks: {cost.ranks}"
    groups = cost.ranks // cost.tensor_ranks
    # With parallel.share=sequence no matrix is split.
    shared = "matrices and sequences" if cost.parameters.split else "sequences"
    return (
        f"ranks: {cost.ranks}, in groups of {cost.tensor_ranks} that share {shared}; groups: "
        f"{groups}"
    )


def describe_tables(cost: "Estimate") -> list[str]:
    """Return how the tables of each section are split over ranks, and why."""
    copies = cost.ranks // cost.memory_ranks
    texts = []
    for section, table in cost.tables.items():
        text = f"{section}: " if len(cost.tables) > 1 else ""
        text += (
            "whole on each rank"
            if cost.memory_ranks == 1
            else f"split by {table.layout.name}, over {cost.memory_ranks} ranks"
        )
        if copies > 1:
            text += f", {copies} copies whose row gradients are summed"
        texts.append(text if cost.memory_ranks == 1 else f"{text} ({table.layout.reason})")
    return texts
