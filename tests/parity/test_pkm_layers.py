"""What product keys are compared with equals its naive twin: flat keys, and a
mixture of experts.
"""

import torch
from torch import Tensor

from memshard.experiments.pkm.layers import FlatKeyMemory, MixtureOfExperts


def _results(y: Tensor, layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [
        y,
        *torch.autograd.grad(
            (y * upstream).sum(), [x, *layer.parameters()], materialize_grads=True
        ),
    ]


def test_flat_keys_are_compared_one_by_one() -> None:
    torch.manual_seed(0)
    memory = FlatKeyMemory(dim=5, keys=4, heads=2, topk=3, key_dim=6, query_norm="layer").double()
    x = torch.randn(7, 5, dtype=torch.float64).requires_grad_()
    queries = memory.query_norm(memory.query(x).view(7, 2, 6))
    rows = []
    for token in range(7):
        y = torch.zeros(5, dtype=torch.float64)
        for head in range(2):
            scores = torch.stack(
                [queries[token, head] @ key for key in memory.flat_keys.weight[head]]
            )
            best = scores.sort(descending=True).indices[:3]
            y = y + scores[best].softmax(-1) @ memory.values.weight[best]
        rows.append(y)
    torch.testing.assert_close(
        _results(memory(x), memory, x),
        _results(torch.stack(rows), memory, x),
        rtol=1e-10,
        atol=1e-10,
    )


def test_every_token_gets_its_experts_and_loads_are_evened_out() -> None:
    torch.manual_seed(0)
    mixture = MixtureOfExperts(dim=5, experts=4, active=2).double().eval()
    torch.nn.init.normal_(mixture.router.weight)
    mixture.bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    x = torch.randn(3, 4, 5, dtype=torch.float64).requires_grad_()
    rows = []
    for token in x.flatten(0, 1):
        gates = mixture.router(token).sigmoid()
        best = (gates + mixture.bias).sort(descending=True).indices[:2].tolist()
        rows.append(
            torch.stack([gates[number] * mixture.experts[number](token) for number in best]).sum(0)
        )
    # The gate is fp32 in every precision.
    torch.testing.assert_close(
        _results(mixture(x), mixture, x),
        _results(torch.stack(rows).view(3, 4, 5), mixture, x),
        rtol=1e-5,
        atol=1e-6,
    )

    mixture.train()
    mixture.router.weight.data[0], mixture.router.weight.data[3] = (
        mixture.router.weight.data[3],
        mixture.router.weight.data[0].clone(),
    )
    tokens = torch.randn(400, 5, dtype=torch.float64)

    def heaviest() -> float:
        chosen = (mixture.router(tokens).sigmoid() + mixture.bias).topk(2).indices
        return float(chosen.flatten().bincount(minlength=4).max() / 200)

    before = heaviest()
    for _ in range(400):
        mixture(tokens)
    assert before > 1.3 > 1.1 > heaviest()
