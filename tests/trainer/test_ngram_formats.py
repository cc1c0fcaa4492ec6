"""N-gram memories under the names of the public codes, and back.

The module below has the parts, under the names, that `Engram` has in deepseek-ai/Engram's
engram_demo_v1.py; outputs are computed from its formula. Qwen's is transformers' own.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memshard.launch.cli.main import main
from memshard.models.context import Context
from memshard.trainer.checkpoint.load_model import LoadedModel, load_model
from tests.trainer.tiny_run import train_run

DIM, ORDER, HEADS, LAYERS = 16, 3, 2, (0, 1)
SETTINGS = (
    "model.memory.layers=[]",
    "model.ngram.layers=[0,1]",
    "model.ngram.heads=2",
    "model.ngram.rows=40",
    "train.steps=1",
    "optimizer.lr=0.3",
)


@pytest.fixture(scope="module", params=["engram", "qwen"])
def trained(
    request: pytest.FixtureRequest, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder, named as its rule, with a run, and its n-gram memories in `ngrams`."""
    folder = tmp_path_factory.mktemp("ngrams") / request.param
    train_run(recipe, folder / "run", *SETTINGS, f"model.ngram.rule={request.param}")
    assert main(["export", str(folder / "run"), str(folder / "ngrams"), "--ngrams"]) == 0
    return folder


class _Engram(nn.Module):
    """`Engram` with hc_mult 1."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        width = (ORDER - 1) * DIM // 2
        self.multi_head_embedding = nn.Module()
        self.multi_head_embedding.register_buffer(
            "offsets", torch.zeros((ORDER - 1) * HEADS, dtype=torch.int64)
        )
        self.multi_head_embedding.embedding = nn.Embedding(rows, DIM // 4)
        self.short_conv = nn.Module()
        self.short_conv.conv = nn.Conv1d(
            DIM, DIM, 4, groups=DIM, bias=False, padding=3 * ORDER, dilation=ORDER
        )
        self.short_conv.norms = nn.ModuleList([nn.RMSNorm(DIM, eps=1e-6)])
        self.value_proj = nn.Linear(width, DIM)
        self.key_projs = nn.ModuleList([nn.Linear(width, DIM)])
        self.norm1 = nn.ModuleList([nn.RMSNorm(DIM, eps=1e-6)])
        self.norm2 = nn.ModuleList([nn.RMSNorm(DIM, eps=1e-6)])

    def forward(self, x: Tensor, hashes: Tensor) -> Tensor:
        parts = self.multi_head_embedding
        read = parts.embedding(hashes + parts.offsets).flatten(-2)
        gate = (self.norm1[0](self.key_projs[0](read)) * self.norm2[0](x)).sum(-1) / DIM**0.5
        gate = (gate.abs().clamp_min(1e-6).sqrt() * gate.sign()).sigmoid()
        value = gate[..., None] * self.value_proj(read)
        mixed = self.short_conv.conv(self.short_conv.norms[0](value).mT)[..., : x.shape[1]]
        return value + F.silu(mixed).mT


def _theirs(folder: Path, layer: int, x: Tensor, tokens: Tensor) -> Tensor:
    """Return what the other code computes with the exported tensors, loaded strictly."""
    tensors = load_file(folder / "ngrams" / "model.safetensors")
    config = json.loads((folder / "ngrams" / "config.json").read_text("utf-8"))
    prefix = {"engram": "layers.{}.engram.", "qwen": "model.language_model.layers.{}.ple."}
    start = prefix[folder.name].format(layer)
    mine = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    if folder.name == "engram":
        module = _Engram(len(mine["multi_head_embedding.embedding.weight"]))
        module.load_state_dict(mine)
        pad, multipliers = config["pad_id"], config["multipliers"][str(layer)]
        mix, hashes = tokens * multipliers[0], []
        for back in range(1, ORDER):
            older = F.pad(tokens, (back, 0), value=pad)[:, : tokens.shape[1]]
            mix = mix ^ (older * multipliers[back])
            hashes += [mix % prime for prime in config["primes"][str(layer)][back - 1]]
        return module(x, torch.stack(hashes, -1))
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    embedding = "ple_embedding.ngram_embedding."
    shards = [mine.pop(f"{embedding}shard_{i}.weight") for i in range(config["split_ngram_parts"])]
    mine[f"{embedding}weight"] = torch.cat(shards)
    place = config["ple_layer_ids"].index(layer + 1)
    module = modeling.Qwen4ExpTextPLELayer(SimpleNamespace(**config), layer, place)
    module.load_state_dict(mine)
    return module(x, tokens, None)


def _ours(loaded: LoadedModel, layer: int, x: Tensor, tokens: Tensor) -> Tensor:
    model = loaded.model
    assert model.window is not None
    ctx = Context.of(tokens)
    ctx = replace(ctx, window=model.window(tokens, ctx)[0])
    return dict(model.ngrams())[layer](x, ctx)[0]


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_the_other_code_computes_the_same(trained: Path, layer: int) -> None:
    loaded = load_model(trained / "run")
    torch.manual_seed(layer)
    tokens, x = torch.randint(3, 300, (2, 20)), torch.randn(2, 20, DIM)
    ours = _ours(loaded, layer, x, tokens)
    torch.testing.assert_close(_theirs(trained, layer, x, tokens), ours, rtol=1e-5, atol=1e-6)
    kernel = dict(loaded.model.ngrams())[layer].convolutions["output"].weight
    assert kernel.abs().min() > 0, "a kernel of zeros would hide the order of its taps"


def test_a_round_trip_changes_nothing(trained: Path, recipe: Path, tmp_path: Path) -> None:
    """Into an untrained model of other weights; it then exports the same bytes."""
    train_run(
        recipe, tmp_path / "fresh", *SETTINGS, f"model.ngram.rule={trained.name}", "train.seed=7"
    )
    file = trained / "ngrams" / "model.safetensors"
    arguments = ["--into", str(tmp_path / "fresh")]
    assert main(["import", str(file), str(tmp_path / "new"), *arguments]) == 0
    assert main(["export", str(tmp_path / "new"), str(tmp_path / "again"), "--ngrams"]) == 0
    before, after = load_file(file), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def _tensors(trained: Path) -> dict[str, Tensor]:
    return load_file(trained / "ngrams" / "model.safetensors")


def _refused(trained: Path, tensors: dict[str, Tensor], out: Path, capfd: Any) -> str:
    save_file(tensors, out / "spoilt.safetensors")
    into = ["--into", str(trained / "run")]
    assert main(["import", str(out / "spoilt.safetensors"), str(out / "new"), *into]) == 2
    assert not (out / "new").exists()
    return str(capfd.readouterr().err)


def _named(tensors: dict[str, Tensor], end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


def test_what_does_not_fit_is_refused(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a sentence that names the tensor; nothing is written."""
    tensors = _tensors(trained)
    offsets = _named(tensors, "offsets")
    changed = {**tensors, offsets: tensors[offsets] + 1}
    assert "set model.ngram.rows, order, heads, seed" in _refused(trained, changed, tmp_path, capfd)
    key = _named(tensors, "value_proj.weight")
    missing = {name: tensor for name, tensor in tensors.items() if name != key}
    assert "layer 0 has no value_proj.weight" in _refused(trained, missing, tmp_path, capfd)
    wide = {**tensors, key: torch.zeros(3, 3)}
    assert "value_proj.weight of shape [3, 3]" in _refused(trained, wide, tmp_path, capfd)
    more = {**tensors, key.replace("value_proj", "key_projs.1"): tensors[key] + 1}
    assert "key_projs.1.weight, which ours lacks" in _refused(trained, more, tmp_path, capfd)
    other = {name.replace("layers.1.", "layers.5."): tensor for name, tensor in tensors.items()}
    assert "in layers [0, 5], and the model in layers [0, 1]" in _refused(
        trained, other, tmp_path, capfd
    )
    if trained.name == "engram":
        bias = _named(tensors, "value_proj.bias")
        biased = {**tensors, bias: tensors[bias] + 1}
        assert "value_proj.bias that is not 0" in _refused(trained, biased, tmp_path, capfd)
    else:
        last = _named(tensors, "shard_100.weight")
        fewer = {name: tensor for name, tensor in tensors.items() if name != last}
        assert "shard_100.weight" in _refused(trained, fewer, tmp_path, capfd)


def test_memories_without_a_public_format_are_refused(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(recipe, tmp_path / "run", *SETTINGS, "model.ngram.rule=longcat")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ngrams"]) == 2
    assert "model.ngram.rule is longcat, for which there is no public format" in (
        capfd.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ngrams"]
    assert main([*arguments, "--dtype", "bf16"]) == 2
    assert "--ngrams goes with no other option" in capfd.readouterr().err
