"""Fast weights of a text in segments on three ranks are those of the whole text: readings, last
state, and gradients, also of the first state.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from memshard.models.fast_weights.delta_rule import delta_rule
from memshard.models.fast_weights.segments import delta_rule_of_segment, sum_rule_of_segment
from memshard.models.fast_weights.sum_rule import sum_rule
from memshard.parallel.segments import RankNeighbours
from tests.distributed import run_distributed

LENGTH, D, M = 12, 5, 3


def _inputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw)

    q, k, v = (
        normal(2, 2, LENGTH, D),
        F.normalize(normal(2, 2, LENGTH, D), dim=-1),
        normal(2, 2, LENGTH, M),
    )
    return {
        "q": q,
        "k": k,
        "v": v,
        "beta": normal(2, 2, LENGTH).sigmoid(),
        "state": normal(2, 2, D, M),
    }


def _probes() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    resets = torch.zeros(2, LENGTH, dtype=torch.bool)
    resets[1, 6] = True
    return torch.randn(2, 2, LENGTH, M).double(), torch.randn(2, 2, D, M).double(), resets


def _read(
    rule: Any, inputs: dict[str, Tensor], resets: Tensor, probe: Tensor, probe_state: Tensor
) -> list[Tensor]:
    """Return readings, last state and the gradients of everything."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, after = rule(**leaves, resets=resets)
    loss = (out * probe).sum() + (after * probe_state).sum()
    return [out.detach(), after.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def _without_beta(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name != "beta"}


def _on_rank(rank: int, world: int) -> list[list[Tensor]]:
    assert dist.group.WORLD is not None
    pieces, local = (
        RankNeighbours(dist.group.WORLD),
        slice(rank * LENGTH // world, (rank + 1) * LENGTH // world),
    )
    inputs = {name: x if name == "state" else x[:, :, local] for name, x in _inputs().items()}
    probe, probe_state, resets = _probes()
    rest = resets[:, local], probe[:, :, local], probe_state / world
    # RankNeighbours of one row, and three rows asked for.
    row = torch.full((1, 1, 2), rank + 1.0, requires_grad=True)
    before = pieces.rows_before(row, 3)
    (gradient,) = torch.autograd.grad((before * torch.tensor([[[1.0], [2.0], [3.0]]])).sum(), row)
    return [
        _read(delta_rule_of_segment(pieces), inputs, *rest),
        _read(sum_rule_of_segment(pieces), _without_beta(inputs), *rest),
        [before.detach(), gradient],
    ]


def test_pieces_are_the_whole() -> None:
    results = run_distributed(_on_rank, 3)
    probe, probe_state, resets = _probes()
    for kind, (rule, inputs) in enumerate(
        [(delta_rule, _inputs()), (sum_rule, _without_beta(_inputs()))]
    ):
        expected = _read(rule, inputs, resets, probe, probe_state)
        out, after, *gradients = zip(*(rank[kind] for rank in results), strict=True)
        joined = [
            torch.cat(out, 2),
            *(torch.cat(gradient, 2) for gradient in gradients[:-1]),
            sum(gradients[-1]),
        ]
        for ours, theirs in zip(joined, [expected[0], *expected[2:]], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        for last in after:
            torch.testing.assert_close(last, expected[1], rtol=1e-12, atol=1e-12)
    rows = [rank[2] for rank in results]
    assert [before[0, :, 0].tolist() for before, _ in rows] == [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert [gradient[0, 0].tolist() for _, gradient in rows] == [[5, 5], [3, 3], [0, 0]]
