"""Adaptive softmax as an output head: the losses are those of its log-probabilities, and every part
of it is trained.
"""

from copy import deepcopy
from typing import Any

import pytest
import torch

from memshard.models.decode.generate import generate
from memshard.models.loss import IGNORE, token_losses
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.transformer import Transformer
from memshard.trainer.cost.operations import flops_per_token
from memshard.trainer.cost.parameters import count_parameters
from tests.models.tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokens

ADAPTIVE: dict[str, Any] = {
    "adaptive_cutoffs": (8, 15),
    "adaptive_division": 2.0,
    "tie_head": False,
    "memory": {"layers": ()},
}


@pytest.mark.parametrize(
    "changes", [{}, {"residual": "reversible"}, {"adaptive_division": 1.0, "norm": "rms"}], ids=str
)
@pytest.mark.parametrize("chunk", [0, 4])
def test_losses_are_those_of_the_log_probabilities(chunk: int, changes: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(**(ADAPTIVE | changes)))
    targets = tiny_tokens(3, 9, seed=1)
    targets[0, 3:5] = IGNORE
    results = []
    for whole in (True, False):
        copy = deepcopy(model)
        copy.configure(Recompute(chunk=chunk))
        out, _ = copy(tiny_tokens(3, 9), targets=None if whole else targets)
        if whole:
            torch.testing.assert_close(out.exp().sum(-1), torch.ones(3, 9, dtype=out.dtype))
        losses = token_losses(out, targets) if whole else out
        (losses * torch.arange(27.0).view(3, 9)).sum().backward()
        results.append([losses.detach(), *(parameter.grad for parameter in copy.parameters())])
    tolerance = 1e-3 if "residual" in changes and chunk else 1e-10  # the grid's steps
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_a_cluster_without_targets_has_a_gradient_of_zero() -> None:
    """Ranks that exchange gradients wait for each parameter."""
    model = tiny_model(tiny_config(**ADAPTIVE))
    model(tiny_tokens(2, 5), targets=torch.zeros(2, 5, dtype=torch.long))[0].sum().backward()
    assert (
        model.head is not None
        and model.embedding.weight.grad is not None
        and model.embedding.weight.grad.any()
    )
    for name, parameter in model.head.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()) == name.startswith(
            "head"
        ), name


@torch.no_grad()
def test_losses_that_nobody_asks_for_are_not_computed() -> None:
    """This holds for windows that slide, and for every head."""
    for changes in ({}, ADAPTIVE):
        model = tiny_model(tiny_config(**changes)).eval()
        seen: list[int] = []
        model.norm.register_forward_hook(
            lambda _, inputs, __, seen=seen: seen.append(inputs[0].shape[:-1].numel())
        )
        targets = tiny_tokens(3, 9, seed=1)
        whole, _ = model(tiny_tokens(3, 9), targets=targets)
        wanted = torch.arange(9).expand(3, -1) > 6
        part, _ = model(tiny_tokens(3, 9), targets=torch.where(wanted, targets, IGNORE))
        assert seen == [27, 6]
        torch.testing.assert_close(part, whole * wanted)


def test_half_precision_and_generation() -> None:
    model = tiny_model(tiny_config(**ADAPTIVE)).float()
    tokens = tiny_tokens(2, 7)
    exact, _ = model(tokens, targets=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = model(tokens, targets=tokens)
        losses.sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)
    new = generate(model.eval(), tokens, 4, temperature=0.0)
    for _ in range(4):
        tokens = torch.cat((tokens, model(tokens)[0][:, -1:].argmax(-1)), 1)
    assert torch.equal(new, tokens[:, 7:])


def test_costs() -> None:
    """Clusters are narrow, and rare tokens pay for them."""
    whole, adaptive = tiny_config(tie_head=False, memory={"layers": ()}), tiny_config(**ADAPTIVE)
    head = 16 * (8 + 2) + 16 * 8 + 8 * 7 + 16 * 4 + 4 * (VOCABULARY - 15)
    assert (
        count_parameters(adaptive).dense == count_parameters(whole).dense - 16 * VOCABULARY + head
    )
    assert flops_per_token(whole, 9) - flops_per_token(adaptive, 9) == 6 * 16 * (VOCABULARY - 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptive_cutoffs": (15, 8)}, "must ascend"),
        ({"adaptive_cutoffs": (8, 99)}, "ends at 99, and there are 23 tokens"),
        ({"tie_head": True}, "set model.tie_head=false"),
        ({"adaptive_division": 0.5}, "at least 1"),
        ({"adaptive_division": 16.0}, "do not fit model.dim, 16"),
    ],
    ids=str,
)
def test_what_does_not_fit_says_so(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(tiny_config(**(ADAPTIVE | changes)))
