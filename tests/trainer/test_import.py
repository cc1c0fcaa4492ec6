"""Memories trained elsewhere give the same outputs here.

The modules below have the parts, under the names, that the other projects' classes have in their
source; outputs are computed from the formula. Read were

    facebookresearch/XLM     xlm/model/memory/memory.py `HashingMemory`, query.py `QueryMLP`, whose
                             `query_mlps` is one nn.Sequential for one layer and for grouped
                             networks, and an nn.ModuleList of them otherwise; PKM-layer.ipynb
    facebookresearch/memory  lingua/product_key/memory.py `HashingMemory` and `QueryMLP`
"""

import json
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import memshard
from memshard.launch.cli.main import main
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.export.export import export
from tests.data_pipeline.conftest import largest_file
from tests.trainer.tiny_run import train_run

DIM, KEYS, HEADS, HALF, TOPK = 10, 7, 3, 4, 5
_WIDTH = HEADS * 2 * HALF


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _read(keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
    """Read the paper's layer over all slots. keys: [heads, 2, n, half]; queries: [tokens,
    heads, 2 half].
    """
    scores = torch.einsum("thd,hnd->thn", queries[..., :HALF], keys[:, 0])[..., :, None]
    scores = (
        scores + torch.einsum("thd,hnd->thn", queries[..., HALF:], keys[:, 1])[..., None, :]
    ).flatten(-2)
    best = scores.topk(TOPK)
    return (best.values.softmax(-1)[..., None] * values[best.indices]).sum((1, 2))


class _Theirs(nn.Module):
    """A memory of XLM's or Meta's code: `keys`, `values` and `query_proj`."""

    def __init__(self, query: nn.Module, keys: Tensor, value_dim: int = DIM) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys)
        self.values = nn.EmbeddingBag(KEYS**2, value_dim, mode="sum")
        self.query_proj = query

    def reading(self, x: Tensor, network: nn.Module) -> Tensor:
        # XLM without different keys has one codebook for all heads and halves.
        shared = self.keys.shape == (KEYS, HALF)
        keys = (
            self.keys.expand(HEADS, 2, KEYS, HALF)
            if shared
            else self.keys.view(HEADS, 2, KEYS, HALF)
        )
        return _read(keys, self.values.weight, network(x).view(-1, HEADS, 2 * HALF))


def _within(name: str, network: nn.Module) -> nn.Module:
    module = nn.Module()
    module.add_module(name, network)
    return module


def _network(*widths: int, norm: bool, bias: bool = True) -> nn.Sequential:
    """Return linear layers, each with batch norm if wanted, and ReLU between them."""
    layers: list[nn.Module] = []
    for ins, outs in pairwise(widths):
        layers += [nn.ReLU()] * bool(layers) + [nn.Linear(ins, outs, bias=bias)]
        layers += [nn.BatchNorm1d(outs)] * norm
    return nn.Sequential(*layers)


def _grouped() -> nn.Sequential:
    """Return XLM's grouped network: a linear layer, then convolutions in a module of their own."""
    convolution = nn.Conv1d(2 * HEADS * 3, _WIDTH, kernel_size=1, groups=2 * HEADS)
    return nn.Sequential(nn.Linear(DIM, 2 * HEADS * 3), nn.ReLU(), _within("layer", convolution))


def _several() -> nn.ModuleList:
    """Return XLM's network for each head and half."""
    return nn.ModuleList(_network(DIM, 3, HALF, norm=False) for _ in range(2 * HEADS))


def _randomised(module: nn.Module) -> Any:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_()
    return module.eval()


def _import(tensors: dict[str, Tensor], folder: Path, *flags: str) -> int:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "theirs.safetensors",
    )
    source, out = str(folder / "theirs.safetensors"), str(folder / "ours")
    return main(["import", source, out, "--topk", str(TOPK), "--json", *flags])


def _check(
    tensors: dict[str, Tensor],
    x: Tensor,
    expected: Tensor,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    *flags: str,
) -> dict[str, Any]:
    capfd.readouterr()
    assert _import(tensors, folder, *flags) == 0
    (report,) = json.loads(capfd.readouterr().out)["memories"]
    memory = memshard.load_memory(report["path"])
    torch.testing.assert_close(memory(x), expected, rtol=1e-4, atol=1e-4)
    assert memory.values.weight.requires_grad and not memory.training
    return report


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keys", [(HEADS, 2, KEYS, HALF), (KEYS, HALF)])
@pytest.mark.parametrize("place", ["query_mlps", "notebook"])
def test_xlm(
    norm: bool,
    bias: bool,
    keys: tuple[int, ...],
    place: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    x, network = _random(20, DIM), _network(DIM, _WIDTH, norm=norm, bias=bias)
    query = network if place == "notebook" else _within(place, network)
    theirs = _randomised(_Theirs(query, _random(*keys)))
    tensors = {f"memories.4_in.{name}": tensor for name, tensor in theirs.state_dict().items()}
    assert "memories.4_in.query_proj.query_mlps.0.weight" in tensors or place == "notebook"
    with torch.no_grad():
        expected = theirs.reading(x, network)
    tensors["embeddings.weight"] = _random(3, 3)
    report = _check(tensors, x, expected, tmp_path, capfd)
    assert report["family"] == "xlm" and report["path"].endswith("memories.4_in")
    assert report["query_norm"] == ("batch" if norm else "none")


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("value_dim", [None, 6, DIM])
@pytest.mark.parametrize("bias", [False, True])
def test_meta(
    gate: bool,
    value_dim: int | None,
    bias: bool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its output is value_proj(reading * silu(swilu_projection(x))); without `swilu_projection`
    value_proj(reading), and without `mem_v_dim` either the reading itself.
    """
    torch.manual_seed(0)
    x, network = _random(20, DIM), _network(DIM, _WIDTH, norm=False, bias=bias)
    width = value_dim or DIM
    theirs = _Theirs(_within("query_mlps", network), _random(2 * HEADS * KEYS, HALF), width)
    theirs.value_proj = nn.Linear(width, DIM) if gate or value_dim else None
    theirs.swilu_projection = nn.Linear(DIM, width) if gate else None
    _randomised(theirs)
    with torch.no_grad():
        expected = theirs.reading(x, network)
        if theirs.swilu_projection is not None:
            expected = expected * F.silu(theirs.swilu_projection(x))
        if theirs.value_proj is not None:
            expected = theirs.value_proj(expected)
    tensors = {f"layers.2.feed_forward.{name}": x for name, x in theirs.state_dict().items()}
    report = _check(tensors, x, expected, tmp_path, capfd)
    assert report["family"] == "meta" and report["gate"] == gate


def test_meta_memories_that_share_values(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Only the first layer of Meta's model that reads the values stores them."""
    torch.manual_seed(0)
    x, networks = _random(20, DIM), [_network(DIM, _WIDTH, norm=False) for _ in range(2)]
    first, second = (
        _Theirs(_within("query_mlps", network), _random(2 * HEADS * KEYS, HALF))
        for network in networks
    )
    second.values = _randomised(first).values
    tensors = {f"layers.2.feed_forward.{name}": x for name, x in first.state_dict().items()}
    tensors |= {f"layers.5.feed_forward.{name}": x for name, x in second.state_dict().items()}
    del tensors["layers.5.feed_forward.values.weight"]
    capfd.readouterr()
    assert _import(tensors, tmp_path) == 0
    reports = json.loads(capfd.readouterr().out)["memories"]
    for theirs, network, report in zip((first, second), networks, reports, strict=True):
        with torch.no_grad():
            expected = theirs.reading(x, network)
        torch.testing.assert_close(memshard.load_memory(report["path"])(x), expected)


@pytest.mark.parametrize("relu", [False, True])
def test_lucidrains_own_layer(
    relu: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """relu stands for its `non_competitive_gates`, which the weights do not show."""
    torch.manual_seed(0)
    theirs = _lucidrains(non_competitive_gates=relu)
    x = _random(2, 9, DIM)
    with torch.no_grad():
        expected = theirs(x)
    flags = ("--weighting", "relu") if relu else ()
    report = _check(dict(theirs.state_dict()), x, expected, tmp_path, capfd, *flags)
    assert report["query_norm"] == "layer-half"


def _lucidrains(**options: bool) -> nn.Module:
    package = pytest.importorskip("product_key_memory")
    layer = package.PKM(DIM, heads=HEADS, num_keys=KEYS, topk=TOPK, dim_head=HALF, **options)
    return _randomised(layer)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("pre_layernorm", "a norm before the query"),
        ("norm_output", "a norm of its output"),
        ("concat_values_and_combine", "values for each head, joined by a matrix"),
    ],
)
def test_lucidrains_variants_that_ours_lacks_are_refused(
    option: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _import(dict(_lucidrains(**{option: True}).state_dict()), tmp_path) == 2
    assert message in capfd.readouterr().err and not (tmp_path / "ours").exists()


_LAYERS = "a query network of several layers"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.ModuleList([_network(DIM, 6, _WIDTH, norm=False)]), _LAYERS),
        (lambda: nn.ModuleList([_network(DIM, 6, _WIDTH, norm=True, bias=False)]), _LAYERS),
        (_several, _LAYERS),
        (_grouped, _LAYERS),
        (lambda: nn.Sequential(nn.Conv2d(DIM, _WIDTH, 1)), "no query network that fits"),
    ],
)
def test_xlm_query_networks_that_ours_lacks_are_refused(
    network: Callable[[], nn.Module],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    theirs = _Theirs(_within("query_mlps", network()), _random(HEADS, 2, KEYS, HALF))
    assert _import(theirs.state_dict(), tmp_path) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": (5, 5)}, "no query network that fits"),
        ({"values.weight": (48, DIM)}, "48 values, which is no square"),
        ({"values.weight": (36, DIM)}, "fit no layout of 3 heads, 6 keys"),
        ({"values.weight": (49, 6)}, "values of width 6, the model has 10"),
        ({"values_u.weight": (2, 2)}, "experts (Meta's PEER variant)"),
        ({"gating.weight": (1, DIM)}, "a scalar gate"),
        ({"swilu_projection.weight": (DIM, DIM)}, "fits no memory of ours: gate.weight"),
        ({"head_permutations": (HEADS, 49)}, "shuffled indices"),
        ({"keys": (HEADS, 3, KEYS, HALF)}, "fit no layout"),
        ({"something.new": (2, 2)}, "a part (something.new), which ours lacks"),
    ],
)
def test_what_is_not_known_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = _network(DIM, _WIDTH, norm=False)
    theirs = _Theirs(_within("query_mlps", network), _random(HEADS, 2, KEYS, HALF))
    changes = {name: _random(*shape) for name, shape in change.items()}
    assert _import(theirs.state_dict() | changes, tmp_path) == 2
    assert message in capfd.readouterr().err and not (tmp_path / "ours").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is left would be refused as a folder that is there already."""
    network = _network(DIM, _WIDTH, norm=False)
    theirs = _Theirs(_within("query_mlps", network), _random(HEADS, 2, KEYS, HALF)).state_dict()
    assert _import(theirs, tmp_path) == 0
    (tmp_path / "ours").rename(tmp_path / "first")
    source, out = str(tmp_path / "theirs.safetensors"), str(tmp_path / "ours")
    with largest_file(1000):
        assert main(["import", source, out, "--topk", str(TOPK)]) == 2
    assert "File too large" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "theirs.safetensors"]


def test_relu_is_refused_where_weights_are_a_softmax(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = _network(DIM, _WIDTH, norm=False)
    theirs = _Theirs(_within("query_mlps", network), _random(HEADS, 2, KEYS, HALF))
    assert _import(theirs.state_dict(), tmp_path, "--weighting", "relu") == 2
    assert "leave out --weighting" in capfd.readouterr().err


def test_a_pickle_is_refused_unread(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs.pth").write_bytes(pickle.dumps(0))
    assert main(["import", str(tmp_path / "theirs.pth"), str(tmp_path / "ours")]) == 2
    assert (
        "nothing pickled is loaded here: convert it" in capfd.readouterr().err
        and not (tmp_path / "ours").exists()
    )


@pytest.mark.parametrize("tables", ["fp32", "fp16"])
def test_an_export_becomes_a_checkpoint_that_trains_on(
    tables: str, recipe: Path, tmp_path: Path
) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=3")
    export(tmp_path / "run", tmp_path / "out", tables=tables)
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    tokens = torch.randint(290, (2, 12))
    with torch.no_grad():
        there, here = load_model(tmp_path / "out"), load_model(tmp_path / "back")
        assert torch.equal(there.model(tokens)[0], here.model(tokens)[0]) and here.step == 3
    result = train_run(
        recipe,
        tmp_path / "more",
        f"init_from={tmp_path / 'back'}",
        f"tables.dtype={tables}",
        "train.steps=2",
    )
    assert result["finished"]
