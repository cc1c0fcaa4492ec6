from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.config import MemoryConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.initialize import initialize
from memshard.models.layers.feedforward import FeedForward
from memshard.models.layers.norm import PrimerNorm
from memshard.models.layers.residual import Residual
from memshard.models.loss import IGNORE, token_losses
from memshard.models.random import RandomKey
from memshard.models.transformer import Transformer
from tests.models.tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokens

_VARIANTS: list[dict[str, Any]] = [
    {"activation": "relu"},
    {"activation": "gelu", "norm": "rms", "position": "none"},
    {"activation": "swiglu", "residual": "post", "memory": {"share": True, "query_norm": "layer"}},
    {
        "activation": "squared_relu",
        "tie_head": False,
        "position": "rotary",
        "memory": {"mode": "add", "query_norm": "lagged"},
    },
    {
        "position": "sinusoidal",
        "memory": {"gate": True, "value_dim": 5, "query_norm": "rms", "share": True},
    },
    {"memory": {"layers": ()}, "residual": "post", "norm": "rms"},
    {"memory": {"layers": (0,), "query_norm": "none", "mode": "add"}, "dropout": 0.3},
]


@pytest.mark.parametrize("changes", _VARIANTS, ids=str)
def test_initialize_fills_everything_and_every_parameter_learns(changes: dict[str, Any]) -> None:
    model = Transformer(tiny_config(**changes))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    initialize(model, 0)
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    tokens = tiny_tokens(2, 9)
    ctx = Context(torch.arange(9).expand(2, -1), random=RandomKey(0, 0, torch.arange(2)))
    logits, _ = model(tokens, ctx)
    losses = token_losses(logits, tokens.roll(-1, dims=1))
    # Small weights: the first guess is nearly uniform.
    assert abs(losses.mean().item() - torch.tensor(VOCABULARY).log().item()) < 1
    losses.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    before = torch.get_rng_state()
    states = {}
    bare: dict[str, Any] = {"layers": ()}
    for name, seed, memory in (
        ("one", 1, {}),
        ("again", 1, {}),
        ("two", 2, {}),
        ("bare", 1, bare),
        ("added", 1, {"mode": "add"}),
    ):
        model = Transformer(tiny_config(memory))
        torch.set_rng_state(before)
        initialize(model, seed)
        assert torch.equal(torch.get_rng_state(), before)
        states[name] = model.state_dict()
    for name, tensor in states["one"].items():
        assert torch.equal(tensor, states["again"][name]), name
        for other in ("bare", "added"):
            assert name not in states[other] or torch.equal(tensor, states[other][name]), (
                other,
                name,
            )
    matrices = [name for name, tensor in states["one"].items() if tensor.std() > 0]
    assert all(not torch.equal(states["one"][name], states["two"][name]) for name in matrices)
    assert (
        len(
            {
                states["one"][name].flatten()[0].item()
                for name in matrices
                if "memory.values" not in name
            }
        )
        > 15
    )


def test_shared_and_own_tables() -> None:
    shared, separate = tiny_model(tiny_config({"share": True})), tiny_model(tiny_config())
    tables = [[memory.values for _, memory in model.memories()] for model in (shared, separate)]
    assert tables[0][0] is tables[0][1] and tables[1][0] is not tables[1][1]
    assert [layer for layer, _ in separate.memories()] == [1, 2]


def test_tied_heads_save_a_matrix() -> None:
    def parameters(tied: bool) -> int:
        return sum(p.numel() for p in Transformer(tiny_config(tie_head=tied)).parameters())

    assert parameters(False) - parameters(True) == VOCABULARY * 16


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_pre_and_post_norm(norm: str) -> None:
    x = torch.randn(3, 8)

    def normed(h: Tensor) -> Tensor:
        return F.layer_norm(h, (8,)) if norm == "layer" else F.rms_norm(h, (8,), eps=1e-6)

    expected = {
        ("pre", False): x + normed(x).sin(),
        ("post", False): normed(x + x.sin()),
        ("pre", True): x + normed(x.sin()),
    }
    for (kind, norm_after), y in expected.items():
        residual = Residual(kind, norm, 8, norm_after)
        torch.testing.assert_close(residual.join(x, residual.after(residual.before(x).sin())), y)


def test_primers_norm_is_layer_norm() -> None:
    ours, theirs, x = (
        PrimerNorm(50).double(),
        nn.LayerNorm(50, eps=1e-6).double(),
        torch.randn(4, 50).double().requires_grad_(),
    )
    theirs.load_state_dict({name: value.normal_() for name, value in ours.state_dict().items()})
    probe = torch.randn(4, 50).double()
    results = [
        (norm(x), *torch.autograd.grad((norm(x) * probe).sum(), (x, *norm.parameters())))
        for norm in (ours, theirs)
    ]
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_primers_norm_is_finite_where_the_mean_is_large(dtype: torch.dtype) -> None:
    """In half precision the published formula finds a negative variance in every third row here."""
    x = (torch.randn(200, 64) + 100).to(dtype)
    y = PrimerNorm(64)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), F.layer_norm(x.float(), (64,)), rtol=0.02, atol=0.02)
    assert PrimerNorm(64)(x.float() * 1000).isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "squared_relu", "swiglu"])
def test_activations(activation: str) -> None:
    layer, x = FeedForward(6, activation).double(), torch.randn(4, 6).double()
    h = x @ layer.up.weight.T
    if layer.gate is None:
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": F.relu,
            "gelu": nn.GELU(),
            "gelu_tanh": nn.GELU(approximate="tanh"),
            "squared_relu": lambda h: F.relu(h) ** 2,
        }
        h = functions[activation](h)
    else:
        h = h * F.silu(x @ layer.gate.weight.T)
    torch.testing.assert_close(layer(x), h @ layer.down.weight.T)
    assert layer.up.out_features == (16 if activation == "swiglu" else 24)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("gelu_tanh", "gelu_pytorch_tanh")],
)
def test_both_forms_of_gelu_are_those_of_transformers(ours: str, theirs: str) -> None:
    functions = pytest.importorskip("transformers.activations").ACT2FN
    layer, x = FeedForward(6, ours).double(), torch.randn(4, 6).double() * 3
    expected = functions[theirs](x @ layer.up.weight.T) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_dropout_of_a_model_does_not_depend_on_the_split_of_the_batch() -> None:
    model = tiny_model(tiny_config({"query_norm": "layer"}, dropout=0.4)).train()
    tokens = tiny_tokens(4, 8)

    def run(rows: slice, step: int = 0) -> Tensor:
        samples = torch.arange(10, 14)[rows]
        ctx = Context(torch.arange(8).expand(len(samples), -1), random=RandomKey(0, step, samples))
        return model(tokens[rows], ctx)[0]

    whole = run(slice(0, 4))
    torch.testing.assert_close(
        whole, torch.cat((run(slice(0, 1)), run(slice(1, 4)))), rtol=1e-10, atol=1e-10
    )
    assert not torch.allclose(whole, run(slice(0, 4), step=1))
    model.eval()
    assert torch.equal(run(slice(0, 4)), run(slice(0, 4), step=1))


def test_losses_skip_ignored_targets() -> None:
    logits, targets = torch.randn(2, 3, 7), torch.tensor([[1, IGNORE, 6], [IGNORE, 0, 0]])
    losses = token_losses(logits, targets)
    expected = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(losses, torch.where(targets == IGNORE, 0.0, expected))
    assert token_losses(logits.half(), targets).dtype == torch.float32


def test_missing_sizes_are_explained() -> None:
    with pytest.raises(ValueError, match="model.vocab_size is not set"):
        Transformer(tiny_config(vocab_size=None))
    with pytest.raises(ValueError, match="model.max_length is not set"):
        Transformer(tiny_config(max_length=None))


@pytest.mark.parametrize(
    ("position", "sees_order", "sees_place"),
    [
        ("learned", True, True),
        ("sinusoidal", True, True),
        ("rotary", True, False),
        ("none", False, False),
    ],
)
def test_what_positions_tell(position: str, sees_order: bool, sees_place: bool) -> None:
    """They tell order: swapping earlier tokens changes the last output of a single layer; and
    place: so does moving the whole text.
    """
    model = tiny_model(tiny_config({"layers": ()}, layers=1, position=position)).eval()
    tokens = torch.tensor([[3, 8, 5, 2]])

    def last(order: list[int], start: int = 0) -> Tensor:
        return model(tokens[:, order], Context.of(tokens, start))[0][:, -1]

    base = last([0, 1, 2, 3])
    assert torch.allclose(base, last([1, 0, 2, 3]), atol=1e-6) != sees_order
    # Angles are fp32.
    assert torch.allclose(base, last([0, 1, 2, 3], start=7), atol=1e-5) != sees_place


@pytest.mark.parametrize("tokens", [torch.zeros(2), torch.zeros(2, 3), torch.zeros(3).long()])
def test_what_is_no_batch_of_tokens_is_named(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"tokens are integers \[batch, length\], not torch"):
        tiny_model()(tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": "8"}, "model.dim is '8'; it must be a whole number"),
        ({"dim": 8.0}, "model.dim is 8.0"),
        ({"layers": None}, "model.layers is None"),
        ({"vocab_size": 8.5}, "model.vocab_size is 8.5"),
        ({"dropout": "0.1"}, "model.dropout is '0.1'; it must be a number"),
        ({"memory": MemoryConfig(keys=16.0)}, "model.memory.keys is 16.0"),  # type: ignore[arg-type]
        ({"memory": MemoryConfig(value_dim=True)}, "model.memory.value_dim is True"),
    ],
)
def test_settings_of_another_type_are_named(settings: dict[str, Any], message: str) -> None:
    """Those of recipes are checked when they are read."""
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)
