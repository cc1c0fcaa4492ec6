"""Memories trained elsewhere give the same outputs here."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import memshard
from memshard.launch.cli.main import main
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.export.export import export
from tests.trainer.tiny_run import train_run

DIM, KEYS, HEADS, HALF, TOPK = 10, 7, 3, 4, 5


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _read(keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
    """The paper's layer over all slots. keys: [heads, 2, n, half]; queries: [tokens, heads, 2
    half].
    """
    scores = torch.einsum("thd,hnd->thn", queries[..., :HALF], keys[:, 0])[..., :, None]
    scores = (
        scores + torch.einsum("thd,hnd->thn", queries[..., HALF:], keys[:, 1])[..., None, :]
    ).flatten(-2)
    best = scores.topk(TOPK)
    return (best.values.softmax(-1)[..., None] * values[best.indices]).sum((1, 2))


def _xlm(norm: bool, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Queries by one linear map and, perhaps, batch norm with running statistics."""
    width, place = HEADS * 2 * HALF, "transformer.memories.4.query_proj.query_mlps.0"
    tensors = {
        "transformer.memories.4.keys": _random(HEADS, 2, KEYS, HALF),
        "transformer.memories.4.values.weight": _random(KEYS**2, DIM),
        f"{place}.0.weight": _random(width, DIM),
        f"{place}.0.bias": _random(width),
        "transformer.embeddings.weight": _random(3, 3),
    }
    queries = F.linear(x, tensors[f"{place}.0.weight"], tensors[f"{place}.0.bias"])
    if norm:
        parts = {
            "weight": _random(width),
            "bias": _random(width),
            "running_mean": _random(width),
            "running_var": torch.rand(width) + 0.5,
        }
        tensors |= {f"{place}.1.{name}": tensor for name, tensor in parts.items()} | {
            f"{place}.1.num_batches_tracked": torch.tensor(3)
        }
        queries = F.batch_norm(
            queries, parts["running_mean"], parts["running_var"], parts["weight"], parts["bias"]
        )
    values = tensors["transformer.memories.4.values.weight"]
    return tensors, _read(
        tensors["transformer.memories.4.keys"], values, queries.view(-1, HEADS, 2 * HALF)
    )


def _meta(x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Flat keys; output value_proj(reading * silu(swilu_projection(x))), both with biases."""
    value_dim = 6
    tensors = {
        "layers.2.feed_forward.keys": _random(2 * HEADS * KEYS, HALF),
        "layers.2.feed_forward.values.weight": _random(KEYS**2, value_dim),
        "layers.2.feed_forward.query_proj.query_mlps.0.0.weight": _random(HEADS * 2 * HALF, DIM),
        "layers.2.feed_forward.query_proj.query_mlps.0.0.bias": _random(HEADS * 2 * HALF),
        "layers.2.feed_forward.swilu_projection.weight": _random(value_dim, DIM),
        "layers.2.feed_forward.swilu_projection.bias": _random(value_dim),
        "layers.2.feed_forward.value_proj.weight": _random(DIM, value_dim),
        "layers.2.feed_forward.value_proj.bias": _random(DIM),
    }
    own = {name.removeprefix("layers.2.feed_forward."): tensor for name, tensor in tensors.items()}
    queries = F.linear(
        x, own["query_proj.query_mlps.0.0.weight"], own["query_proj.query_mlps.0.0.bias"]
    ).view(-1, HEADS, 2 * HALF)
    y = _read(own["keys"].view(HEADS, 2, KEYS, HALF), own["values.weight"], queries)
    gated = y * F.silu(F.linear(x, own["swilu_projection.weight"], own["swilu_projection.bias"]))
    return tensors, F.linear(gated, own["value_proj.weight"], own["value_proj.bias"])


def _check(
    tensors: dict[str, Tensor],
    x: Tensor,
    expected: Tensor,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> dict[str, Any]:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "theirs.safetensors",
    )
    capfd.readouterr()
    assert (
        main(
            [
                "import",
                str(folder / "theirs.safetensors"),
                str(folder / "ours"),
                "--topk",
                str(TOPK),
                "--json",
            ]
        )
        == 0
    )
    (found,) = json.loads(capfd.readouterr().out)["memories"]
    memory = memshard.load_memory(found["path"])
    torch.testing.assert_close(memory(x), expected, rtol=1e-4, atol=1e-4)
    assert memory.values.weight.requires_grad and not memory.training
    return found


@pytest.mark.parametrize("norm", [False, True])
def test_xlm(norm: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    x = _random(20, DIM)
    tensors, expected = _xlm(norm, x)
    found = _check(tensors, x, expected, tmp_path, capfd)
    assert found["family"] == "xlm" and found["path"].endswith("transformer.memories.4")
    assert found["query_norm"] == ("batch" if norm else "none")


def test_meta(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    x = _random(20, DIM)
    tensors, expected = _meta(x)
    assert _check(tensors, x, expected, tmp_path, capfd)["family"] == "meta"


def test_lucidrains_own_layer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    theirs = (
        pytest.importorskip("product_key_memory")
        .PKM(DIM, heads=HEADS, num_keys=KEYS, topk=TOPK, dim_head=HALF)
        .eval()
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
        x = _random(2, 9, DIM)
        expected = theirs(x)
    assert (
        _check(dict(theirs.state_dict()), x, expected, tmp_path, capfd)["query_norm"]
        == "layer-half"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": (5, 5)}, "no query network that fits"),
        ({"values.weight": (48, DIM)}, "48 values, which is no square"),
        ({"values_u.weight": (2, 2)}, "an expert memory"),
        ({"query_proj.query_mlps.0.2.weight": (2, 2)}, "a query network of several layers"),
        ({"keys": (HEADS, 3, KEYS, HALF)}, "fit no layout"),
    ],
)
def test_what_is_not_known_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors, _ = _xlm(False, _random(2, DIM))
    tensors = {
        name.removeprefix("transformer.memories.4."): tensor for name, tensor in tensors.items()
    }
    save_file(
        tensors | {name: _random(*shape) for name, shape in change.items()},
        tmp_path / "theirs.safetensors",
    )
    assert main(["import", str(tmp_path / "theirs.safetensors"), str(tmp_path / "ours")]) == 2
    assert message in capfd.readouterr().err


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
