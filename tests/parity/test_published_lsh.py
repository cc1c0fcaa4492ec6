"""The published rules of LSH attention: transformers' layer number for number, and the paper's by
brute force.
"""

import pytest
import torch
from torch import Tensor, nn

from memshard.models.config import FeedForwardConfig, MixerConfig, ModelConfig
from memshard.models.lsh.hashing import hash_buckets
from memshard.models.lsh.published import published_attention, unit_keys
from memshard.models.transformer import Transformer


@pytest.mark.parametrize("spread", [0.02, 0.5])
@pytest.mark.parametrize(("length", "rounds"), [(64, 1), (64, 4), (96, 2), (16, 2)])
def test_transformers_lsh_layer(length: int, rounds: int, spread: float) -> None:
    """Copied random weights and the same buckets give the same outputs and gradients, also with
    weights as small as transformers' initial ones (0.02).
    """
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    from transformers import ReformerConfig

    torch.manual_seed(length + rounds)
    settings = ReformerConfig(
        hidden_size=24,
        num_attention_heads=2,
        attention_head_size=12,
        num_hashes=rounds,
        num_buckets=8,
        lsh_attn_chunk_length=16,
        is_decoder=True,
        attn_layers=["lsh"],
        lsh_attention_probs_dropout_prob=0.0,
        axial_pos_embds=False,
    )
    layer = reformer.LSHSelfAttention(settings, 0).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=spread)
    x = torch.randn(3, length, 24, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(3, length, 24, dtype=torch.float64)
    if length > 16:
        heads = layer._split_hidden_size_dim(layer.query_key(x), 2, 12)
        flat = layer._hash_vectors(heads, rounds, None)
        theirs = layer(x, buckets=flat).hidden_states
        buckets = (flat.view(6, rounds, length) - 8 * torch.arange(rounds)[:, None]).long()
    else:
        theirs, buckets = layer(x).hidden_states, torch.zeros(6, rounds, length, dtype=torch.long)
    q, v = (
        project(x).unflatten(-1, (2, 12)).transpose(1, 2).flatten(0, 1)
        for project in (layer.query_key, layer.value)
    )
    ours = (
        published_attention(q, unit_keys(q, "hf_compat"), v, buckets, 16, "hf_compat")
        .unflatten(0, (3, 2))
        .transpose(1, 2)
        .flatten(2)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    weights = x, layer.query_key.weight, layer.value.weight
    gradients = [
        torch.autograd.grad((y * probe).sum(), weights, retain_graph=True) for y in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def _brute_force(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, chunk: int) -> Tensor:
    """Attend within one row by softmax over the union of what the rounds' chunks show of the
    query's bucket's earlier tokens.
    """
    _rounds, length = buckets.shape
    out = []
    for i in range(length):
        seen = set()
        for numbers in buckets:
            places = numbers.argsort(stable=True).argsort() // chunk
            seen |= {
                j for j in range(i) if numbers[j] == numbers[i] and 0 <= places[i] - places[j] <= 1
            }
        chosen = sorted(seen)
        out.append((k[chosen] @ q[i]).softmax(0) @ v[chosen] if chosen else v[i])
    return torch.stack(out)


def test_the_papers_rule() -> None:
    torch.manual_seed(0)
    q, v = torch.randn(2, 2, 48, 6, dtype=torch.float64)
    k = torch.nn.functional.normalize(q, dim=-1)
    buckets = torch.randint(4, (2, 3, 48))
    ours = published_attention(q, k, v, buckets, 8, "paper_causal")
    theirs = torch.stack([_brute_force(*row, 8) for row in zip(q, k, v, buckets, strict=True)])
    lonely = (theirs == v).all(-1)
    torch.testing.assert_close(ours[~lonely], theirs[~lonely], rtol=1e-9, atol=1e-9)
    # Their constant for a token itself is rounded away against fp64's log-sum-exp too, by about
    # 1e-11.
    torch.testing.assert_close(ours[lonely], theirs[lonely], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", ["paper_causal", "hf_compat"])
def test_published_rules_are_not_strictly_causal(rule: str) -> None:
    """This is why they are not the default: later tokens change what earlier ones see."""
    torch.manual_seed(0)
    q, buckets = torch.randn(1, 64, 6), torch.randint(3, (1, 2, 64))
    changed = buckets.clone()
    changed[..., 40:] = torch.randint(3, (1, 2, 24))
    first, second = (
        published_attention(q, unit_keys(q, rule), q, hashed, 8, rule)
        for hashed in (buckets, changed)
    )  # type: ignore[arg-type]
    assert (first[:, :40] != second[:, :40]).any()
    with pytest.raises(ValueError, match="must fill a sequence"):
        published_attention(q[:, :63], q[:, :63], q[:, :63], buckets[..., :63], 8, rule)  # type: ignore[arg-type]


@pytest.mark.slow
def test_transformers_reformer() -> None:
    """Copied random weights give whole models equal logits, with our rotations in both."""
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    from transformers import ReformerConfig

    torch.manual_seed(0)
    layers, buckets, length = 3, 8, 64
    settings = ReformerConfig(
        hidden_size=24,
        num_attention_heads=2,
        attention_head_size=12,
        feed_forward_size=48,
        num_hashes=2,
        num_buckets=buckets,
        lsh_attn_chunk_length=16,
        attn_layers=["lsh"] * layers,
        axial_pos_shape=[8, 8],
        axial_pos_embds_dim=[12, 12],
        max_position_embeddings=length,
        vocab_size=30,
        hidden_act="relu",
        layer_norm_eps=1e-5,
        is_decoder=True,
        tie_word_embeddings=False,
    )
    theirs = reformer.ReformerModelWithLMHead(settings).double().eval()
    config = ModelConfig(
        vocab_size=30,
        layers=layers,
        dim=24,
        max_length=length,
        position="axial",
        axial=(8, 8),
        residual="reversible",
        tie_head=False,
        mixer=MixerConfig(
            kind="lsh", heads=2, rounds=2, chunk=16, buckets=buckets, rule="hf_compat"
        ),
        feedforward=FeedForwardConfig(activation="relu", hidden=48),
    )
    ours = Transformer(config).double().eval()
    assert ours.grid is not None and ours.positions is not None and ours.head is not None
    ours.grid.scale.fill_(2.0**40)  # they do not round

    def copy(module: nn.Module, source: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter, std=0.4)
            source.get_parameter(name).data.copy_(parameter.data)

    model = theirs.reformer
    copy(ours.embedding, model.embeddings.word_embeddings)
    for axis, weights in zip(
        ours.positions.axes, model.embeddings.position_embeddings.weights, strict=True
    ):  # type: ignore[call-overload]
        nn.init.normal_(axis.weight)
        weights.data.copy_(axis.weight.view_as(weights))
    copy(ours.norm, model.encoder.layer_norm)
    copy(ours.head, theirs.lm_head.decoder)
    for number, (block, layer) in enumerate(zip(ours.blocks, model.encoder.layers, strict=True)):
        attention, feedforward = layer.attention, layer.feed_forward
        copy(block.mixer_residual.norm, attention.layer_norm)
        copy(block.mixer.query, attention.self_attention.query_key)  # type: ignore[arg-type, union-attr]
        copy(block.mixer.value, attention.self_attention.value)  # type: ignore[arg-type, union-attr]
        copy(block.mixer.output, attention.output.dense)  # type: ignore[arg-type, union-attr]
        copy(block.feedforward_residual.norm, feedforward.layer_norm)
        for part, dense in (("up", feedforward.dense.dense), ("down", feedforward.output.dense)):
            copy(getattr(block.feedforward, part), dense)
            nn.init.zeros_(dense.bias)

        def hashed(q: Tensor, rounds: int, *_: object, seed: int = number) -> Tensor:
            numbers = hash_buckets(q.transpose(0, 1), buckets, rounds, seed).permute(2, 0, 1, 3)
            return (numbers + buckets * torch.arange(rounds)[:, None]).flatten(2)

        attention.self_attention._hash_vectors = hashed
    tokens = torch.randint(30, (2, length))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=1e-9, atol=1e-9)
