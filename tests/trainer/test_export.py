"""An export is the checkpoint's model in one file, and says so only after it has compared them."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors import safe_open

from memshard.data_pipeline.prepare.inputs import Sources, find_files
from memshard.data_pipeline.prepare.pipeline import build_data
from memshard.launch.cli.main import main
from memshard.models.memory.disk_table import MappedTable
from memshard.models.memory.product_key import slot_rows
from memshard.models.memory.table import find_tables
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.export import export as export_module
from memshard.trainer.export.export import export, quantise
from tests.data_pipeline.conftest import write_corpus
from tests.distributed import run_distributed
from tests.trainer.tiny_run import TABLE, train_run

LAYOUTS = [(), ("parallel.layout=columns",)]
KINDS = {
    "shared": (),
    "own tables, gated, half": (
        "model.memory.share=false",
        "model.memory.gate=true",
        "model.memory.value_dim=12",
        "tables.dtype=fp16",
    ),
    "peer": ("model.memory.kind=peer", "model.tie_head=false", "model.position=rotary"),
    "fast weights": ("model.mixer.kind=delta", "model.position=sinusoidal"),
    "n-grams": (
        "model.memory.layers=[]",
        "model.ngram.layers=[0,1]",
        "model.ngram.heads=2",
        "model.ngram.rows=13",
        "model.ngram.value_dim=4",
    ),
    "lsh": ("model.mixer.kind=lsh", "model.mixer.chunk=2", "model.position=rotary"),
    "reversible": (
        "model.residual=reversible",
        "model.tie_head=false",
        "model.adaptive_cutoffs=[100]",
        "model.position=axial",
    ),
    "none": ("model.memory.layers=[]", "model.norm=rms"),
}


def _train_on_ranks(rank: int, world: int, recipe: Path, folder: Path, *settings: str) -> None:
    train_run(recipe, folder, "train.steps=2", *settings)


def _logits(path: Path, memmap: bool = False) -> torch.Tensor:
    loaded = load_model(path, memmap)
    assert {type(table) is MappedTable for _, table in find_tables(loaded.model)} <= {memmap}
    tokens = torch.randint(290, (3, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(tokens)[0]
    return logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_of_shards_gives_the_same_logits(
    layout: tuple[str, ...], recipe: Path, tmp_path: Path
) -> None:
    run_distributed(_train_on_ranks, 2, recipe, tmp_path / "run", *layout)
    expected = _logits(tmp_path / "run")
    torch.testing.assert_close(_logits(tmp_path / "run", memmap=True), expected)
    exported = export(tmp_path / "run", tmp_path / "out")
    assert exported.difference == 0 and exported.step == 2
    for memmap in (False, True):
        torch.testing.assert_close(_logits(tmp_path / "out", memmap), expected)


def test_a_run_may_remove_a_checkpoint_while_it_is_exported(
    run_and_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that trains on does, whose saves come sooner than a large export ends."""
    run = Path(shutil.copytree(run_and_export / "run", tmp_path / "run"))
    expected, open_model = _logits(run), export_module.open_model

    def open_and_prune(source: Path) -> object:
        stored = open_model(source)
        shutil.rmtree(stored.folder)
        return stored

    monkeypatch.setattr(export_module, "open_model", open_and_prune)
    assert export(run, tmp_path / "out").difference == 0
    torch.testing.assert_close(_logits(tmp_path / "out"), expected)


# Rounding flips buckets, too, and with them all that a token sees.
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"lsh"}))
def test_every_kind_of_model_in_every_dtype(kind: str, recipe: Path, tmp_path: Path) -> None:
    """An export is exported again without a change. bf16 flips which slots such an untrained model
    reads, hence the wide bound; fp16 does not after a step on this order's first batch.
    """
    train_run(recipe, tmp_path / "run", "train.steps=1", "data.order=contiguous", *KINDS[kind])
    expected = _logits(tmp_path / "run")
    for dtype, tables, tolerance in (
        ("fp32", None, 1e-5),
        ("fp16", None, 1e-2),
        ("bf16", "int8", 1),
    ):
        out, again = tmp_path / dtype, tmp_path / f"{dtype} again"
        exported = export(tmp_path / "run", out, dtype, tables)
        error = (_logits(out) - expected).abs().max()
        assert (
            error < tolerance * expected.abs().max()
            and exported.difference < tolerance * expected.abs().max()
        )
        torch.testing.assert_close(_logits(out), _logits(out, memmap=True))
        assert export(out, again, dtype, tables).difference < 1e-3
        assert (
            tables
            or (out / "model.safetensors").read_bytes()
            == (again / "model.safetensors").read_bytes()
        )


def test_tables_are_in_slot_order(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=1")
    export(tmp_path / "run", tmp_path / "out")
    table = dict(find_tables(load_model(tmp_path / "run").model))[TABLE]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert [name for name in file.keys() if "values" in name] == [f"model.{TABLE}.weight"]  # noqa: SIM118
        values = file.get_tensor(f"model.{TABLE}.weight")
    for i1, i2 in ((0, 0), (0, 7), (5, 2)):
        row = slot_rows(torch.tensor(i1), torch.tensor(i2), 8)
        assert torch.equal(values[8 * i1 + i2], table.weight[row])


def test_scales_of_a_reversible_models_grid_are_none_of_a_table(
    recipe: Path, tmp_path: Path
) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=1", "model.residual=reversible")
    export(tmp_path / "run", tmp_path / "out", tables="int8")
    assert any(name.endswith(".scale") for name in load_model(tmp_path / "out").model.state_dict())


def test_int8_rows_are_off_by_half_a_step_at_most() -> None:
    values = torch.randn(50, 30) * torch.logspace(-30, 3, 50)[:, None]
    values[7] = 0
    whole, scale = quantise(values)
    assert (
        (whole * scale[:, None] - values).abs() <= 0.501 * values.abs().amax(1, keepdim=True) / 127
    ).all()


def test_a_wrong_export_gets_no_name(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sub-keys are swapped: the table of slots is transposed."""
    train_run(recipe, tmp_path / "run", "train.steps=1")
    monkeypatch.setattr(export_module, "slot_rows", lambda i1, i2, keys: slot_rows(i2, i1, keys))
    with pytest.raises(ValueError, match="disagrees with .* in a logit"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [100, -40])
def test_a_damaged_export_is_refused(
    place: int, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=1")
    export(tmp_path / "run", tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    assert main(["generate", str(tmp_path / "out"), "--prompt", "x"]) == 2
    assert (
        f"{tmp_path / 'out'} is damaged (ValueError: model.safetensors does not match its hash)"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize("length", [1 << 62, 10, 99])
def test_a_header_of_an_absurd_size_is_refused(length: int, recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=1")
    export(tmp_path / "run", tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(ValueError, match="out is damaged .Safetensor"):
        load_model(tmp_path / "out", memmap=True)


def test_what_the_command_says(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=1")
    capfd.readouterr()
    assert (
        main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--tables", "int8", "--json"])
        == 0
    )
    result: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert (
        result["step"] == 1
        and result["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    )
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "out is there already: give the name of a new folder" in capfd.readouterr().err


_LOAD = """
import os, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.startswith("memshard") for name in sys.modules)
folder, out = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
texts = ["def read(self)", " a \\u2581 b  c\\n", "x"]
for text in texts:
    decoded = tokenizer.decode(tokenizer(text)["input_ids"])
    assert decoded == text, decoded
batch = tokenizer(texts, return_tensors="pt", padding=True)
tokens = torch.randint(290, (3, 20), generator=torch.Generator().manual_seed(3))
with torch.no_grad():
    logits = model(tokens).logits
    torch.testing.assert_close(model(tokens, use_cache=True).logits, logits)
limit = model.config.max_position_embeddings
if model.config.model["position"] in ("learned", "axial"):
    for beyond in (
        lambda: model(torch.ones(1, limit + 1, dtype=torch.long)),
        lambda: model.generate(torch.ones(1, limit, dtype=torch.long), max_new_tokens=9),
    ):
        try:
            beyond()
        except ValueError as error:
            assert f"the text has {limit + 1} tokens and the model {limit}" in str(error), error
        else:
            raise AssertionError("positions beyond the last")
model.eval()
first = tokenizer(texts[0], return_tensors="pt")
plain = {"max_new_tokens": 8, "do_sample": False}
greedy = [model.generate(**tokenizer(text, return_tensors="pt"), **plain)[0] for text in texts]
longer = model.generate(**first, **plain | {"max_new_tokens": int(sys.argv[3])})[0]
uncached = model.generate(**first, **plain, use_cache=False)[0]
padded = model.generate(**batch, max_new_tokens=8, do_sample=False)
beams = model.generate(**first, **plain, num_beams=3)
beams_uncached = model.generate(**first, **plain, num_beams=3, use_cache=False)
assert torch.equal(beams, beams_uncached)
assert torch.equal(greedy[0], uncached)
longer_uncached = model.generate(
    **first, **plain | {"max_new_tokens": int(sys.argv[3])}, use_cache=False
)[0]
assert torch.equal(longer, longer_uncached)
for alone, row in zip(greedy, padded):
    new = alone[-8:] if len(alone) >= 8 else alone
    ended = tokenizer.eos_token_id in row.tolist()
    assert alone.tolist()[-3:] == row.tolist()[-3:] or ended, (alone, row)
model.save_pretrained(out + "-again")
torch.save({"logits": logits, "greedy": greedy[0], "prompt": batch["input_ids"][0]}, out)
assert not any(name.startswith("memshard.") for name in sys.modules)
"""


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        ("shared", None),
        pytest.param("own tables, gated, half", "int8", marks=pytest.mark.slow),
        ("lsh", None),
        pytest.param("reversible", None, marks=pytest.mark.slow),
        pytest.param("peer", None, marks=pytest.mark.slow),
        pytest.param("fast weights", None, marks=pytest.mark.slow),
    ],
)
def test_transformers_loads_it_without_memshard(
    kind: str, tables: str | None, recipe: Path, tmp_path: Path
) -> None:
    """It is loaded offline, from the export's own code."""
    pytest.importorskip("transformers")
    train_run(recipe, tmp_path / "run", "train.steps=2", *KINDS[kind])
    export(tmp_path / "run", tmp_path / "out", tables=tables, huggingface=True)
    expected = _logits(tmp_path / "out")
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-c",
        _LOAD,
        str(tmp_path / "out"),
        str(tmp_path / "result"),
        "100" if kind in ("peer", "fast weights", "lsh") else "9",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=offline, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result")
    torch.testing.assert_close(result["logits"], expected, rtol=1e-4, atol=1e-4)


def test_an_export_takes_eos_from_a_foreign_tokenizer(recipe: Path, tmp_path: Path) -> None:
    """As stock spm_train makes one: <s> is 1, </s> is 2."""
    pytest.importorskip("transformers")
    from memshard.trainer.export.remote.modeling_memshard import MemshardForCausalLM
    from memshard.trainer.export.remote.tokenization_memshard import MemshardTokenizer

    write_corpus(tmp_path / "text", documents=8, seed=2)
    lines = "".join(file.read_text() for file in (tmp_path / "text").rglob("*.txt")).split("\n")
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=proto, vocab_size=50, minloglevel=2
    )
    (tmp_path / "stock.model").write_bytes(proto.getvalue())
    sources = Sources(find_files([tmp_path / "text"]))
    build_data(
        sources, tmp_path / "data", tokenizer=tmp_path / "stock.model", held_out=0.3, workers=1
    )
    train_run(recipe, tmp_path / "run", "train.steps=1", f"data.path={tmp_path / 'data'}")
    export(tmp_path / "run", tmp_path / "out", huggingface=True)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == 2
    tokenizer = MemshardTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("</s>", 2, 2)
    assert len(tokenizer) == tokenizer.vocab_size == 50
    model = MemshardForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = tokenizer(["w1", "w1 w2 w3 w4"], return_tensors="pt", padding=True)
    assert model.generate(**batch, max_new_tokens=4, do_sample=False).shape[0] == 2


def test_an_export_brings_the_code_that_its_model_needs(recipe: Path, tmp_path: Path) -> None:
    train_run(recipe, tmp_path / "run", "train.steps=1", *KINDS["none"])
    export(tmp_path / "run", tmp_path / "out", huggingface=True)
    code = " ".join(file.stem for file in (tmp_path / "out").glob("*.py"))
    assert "models_mixers_softmax" in code
    for part in ("lsh", "fast_weights", "program", "reversible", "bidirectional", "adaptive"):
        assert part not in code
