"""Classes of other projects, where they are installed, compute what ours do on copied weights."""

import pytest
import torch

from memshard.models.fast_weights.delta_rule import delta_rule
from memshard.models.memory.peer import Peer
from memshard.models.memory.product_key import row_slots


@pytest.mark.parametrize("competing", [True, False])
def test_lucidrains_peer(competing: bool) -> None:
    """Without competition its scores go through ReLU; it reads one expert a head then, and ours
    divides by their number.
    """
    package = pytest.importorskip("PEER_pytorch")
    torch.manual_seed(0)
    dim, heads, keys, half, topk = 12, 3, 7, 4, 5 if competing else 1
    theirs = package.PEER(
        dim,
        heads=heads,
        num_experts=keys**2,
        num_experts_per_head=topk,
        dim_key=half,
        non_competing_scores=not competing,
    )
    ours = Peer(
        dim, keys, heads, topk, 2 * half, "none", weighting="softmax" if competing else "relu"
    )
    theirs, ours = theirs.double().eval(), ours.double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        # Theirs by half and then head, and with the slots in their own order.
        queries = theirs.to_queries[0].weight.view(2, heads, half, dim).transpose(0, 1)
        ours.query.weight.copy_(queries.reshape(-1, dim))
        ours.query.bias.zero_()
        ours.sub_keys.weight.copy_(theirs.keys.transpose(1, 2))
        slots = row_slots(torch.arange(keys**2), keys)
        ours.down.weight.copy_(theirs.weight_down_embed.weight[slots])
        ours.values.weight.copy_(theirs.weight_up_embed.weight[slots])
    x = torch.randn(2, 30, dim, dtype=torch.float64, requires_grad=True)
    outputs = ours(x), theirs(x)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(x)
    gradients = [torch.autograd.grad((y * probe).sum(), x)[0] for y in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_transformers_gated_delta_rule() -> None:
    """Theirs computes in fp32, divides queries by the root of their width, and has tokens before
    heads.
    """
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in torch.randn(2, 2, 3, 70, 8))
    v, beta, log_decay = torch.randn(2, 3, 70, 5), torch.rand(2, 3, 70), -torch.rand(2, 3, 70)
    start = torch.randn(2, 3, 8, 5)
    ours, state = delta_rule(q, k, v, beta, start, log_decay)
    theirs, last = modeling.torch_recurrent_gated_delta_rule(
        *(x.transpose(1, 2) for x in (q * 8**0.5, k, v, log_decay, beta)),
        initial_state=start,
        output_final_state=True,
    )
    torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)
