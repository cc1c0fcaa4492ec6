"""What a search has found trains, resumes, generates and exports like any other model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memshard.launch.cli.main import main
from memshard.models.config import ModelConfig, NgramConfig
from memshard.models.decode.generate import generate
from memshard.models.loss import token_losses
from memshard.models.program.mixer import ProgramMixer
from memshard.parallel.tensor_placement import split_matrices
from memshard.search.dna.compile import Compiled, Shape, compile_dna
from memshard.search.dna.golden import golden
from memshard.trainer.checkpoint.load_model import load_model
from memshard.trainer.config.load import load_recipe
from memshard.trainer.cost.activations import activation_bytes
from memshard.trainer.export.export import export
from tests.distributed import run_distributed
from tests.live_bytes import LiveBytes
from tests.models.tiny import tiny_model, tiny_tokens
from tests.trainer.tiny_run import assert_same, checkpoint_state, train_run


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return settings of a recipe: Primer-EZ with heads of two channels, and a memory behind the
    first block.
    """
    program = compile_dna(
        golden("primer-ez", 2), Shape(vocab=1, length=32, parameters=(6_000, 8_000), layers=2)
    )
    assert (
        isinstance(program, Compiled)
        and program.config.dim == 16
        and program.config.program is not None
    )
    path = tmp_path_factory.mktemp("program") / "winner.json"
    path.write_text(program.config.program)
    memory = ("model.memory.layers=[0]", "model.memory.query_norm=layer")
    return (
        f"model.program={path}",
        "model.dropout=0",
        "model.position=sinusoidal",
        "train.steps=8",
        *memory,
    )


def test_a_program_behind_n_grams_decodes_as_it_reads(settings: tuple[str, ...]) -> None:
    """The residual is the program's own, so what an n-gram memory adds must come through it."""
    ngram = NgramConfig(layers=(0, 1), rows=13, heads=2, value_dim=4)
    text = Path(settings[0].partition("=")[2]).read_text()
    config = ModelConfig(
        vocab_size=23, layers=2, dim=16, program=text, position="sinusoidal", ngram=ngram
    )
    model, tokens = tiny_model(config).eval(), tiny_tokens(2, 12)
    with torch.no_grad():
        full, states, parts = model(tokens)[0], model.init_states(2, 12), []
        for start, end in ((0, 5), (5, 6), (6, 12)):
            logits, states = model(tokens[:, start:end], None, states)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-10, atol=1e-10)
    tokens[:, 0] = (tokens[:, 0] + 1) % 23
    with torch.no_grad():
        assert not torch.equal(model(tokens)[0][:, 1], full[:, 1])


def test_a_program_trains_resumes_generates_and_exports(
    recipe: Path, settings: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train_run(recipe, tmp_path / "whole", *settings)
    assert result["loss"] < 5.6
    train_run(recipe, tmp_path / "parts", *settings, stop_at=5)
    Path(settings[0].partition("=")[2]).rename(
        tmp_path / "gone.json"
    )  # A run needs the file no more.
    train_run(tmp_path / "parts", tmp_path / "parts")
    (tmp_path / "gone.json").rename(settings[0].partition("=")[2])
    assert_same(checkpoint_state(tmp_path / "whole"), checkpoint_state(tmp_path / "parts"))

    model = load_model(tmp_path / "whole").model
    with pytest.raises(ValueError, match="model.program is not split by channels"):
        split_matrices(model, 2)
    assert all(isinstance(block.mixer, ProgramMixer) for block in model.blocks)
    tokens = prompt = torch.tensor([[5, 9, 11]])
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat((tokens, model(tokens)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(model, prompt, 12, temperature=0), tokens[:, 3:])
    assert main(["generate", str(tmp_path / "whole"), "--prompt", "a", "--max-tokens", "4"]) == 0
    with pytest.raises(ValueError, match="prompts of one length"):
        generate(
            model,
            torch.tensor([[1, 5], [5, 9]]),
            3,
            real=torch.tensor([[False, True], [True, True]]),
        )
    assert main(["eval", str(tmp_path / "whole")]) == 0
    assert export(tmp_path / "whole", tmp_path / "out").difference == 0
    capsys.readouterr()


def _train(rank: int, world: int, recipe: Path, folder: Path, *settings: str) -> None:
    train_run(recipe, folder, *settings)


_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
prompt = torch.tensor([[5, 9, 11]])
plain = {"max_new_tokens": 9, "do_sample": False}
cached, again = (model.generate(prompt, **plain, use_cache=use) for use in (True, False))
assert torch.equal(cached, again)
beams, again = (
    model.generate(prompt, **plain, num_beams=3, use_cache=use) for use in (True, False)
)
assert torch.equal(beams, again)
torch.save(model(prompt).logits.detach(), sys.argv[2])
"""


@pytest.mark.slow
def test_transformers_loads_a_program(
    recipe: Path, settings: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    train_run(recipe, tmp_path / "run", *settings)
    export(tmp_path / "run", tmp_path / "out", huggingface=True)
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "out"), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, env=offline, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load_model(tmp_path / "run").model(torch.tensor([[5, 9, 11]]))[0]
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_ranks_share_the_batch_of_a_program(
    recipe: Path, settings: tuple[str, ...], tmp_path: Path
) -> None:
    run_distributed(_train, 2, recipe, tmp_path / "two", *settings)
    train_run(recipe, tmp_path / "one", *settings)
    one, two = (checkpoint_state(tmp_path / name) for name in ("one", "two"))
    name = "model.blocks.1.mixer.values.9"
    torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("model.dim=24", "compiled for 16: set model.dim=16"),
        ("model.program=missing.json", "no file missing.json"),
        ("model.residual=post", "model.program is the whole block"),
        ("data.document_mask=true", "leave one of them out"),
        ("train.segments=2", "model.program is a block without"),
        ('model.program={"width": 16, "nodes": [{"op": "EVIL", "inputs": [0]}]}', "model.program"),
    ],
)
def test_what_cannot_be_is_said(
    recipe: Path, settings: tuple[str, ...], change: str, problem: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        train_run(recipe, tmp_path / "run", *settings, change)


def test_a_recipe_holds_the_text_of_its_program(recipe: Path, settings: tuple[str, ...]) -> None:
    text = load_recipe(recipe, settings).model.program
    assert text is not None and json.loads(text)["width"] == 16


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["transformer", "primer"])
def test_the_memory_estimate_is_on_the_safe_side(name: str, half: bool) -> None:
    program = compile_dna(
        golden(name, 8), Shape(vocab=29, length=96, parameters=(90_000, 130_000), layers=2)
    )
    assert isinstance(program, Compiled)
    model, tokens = program.build(0), torch.randint(29, (4, 96))
    with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = token_losses(model(tokens), tokens)
        kept = live.now
    assert 1 <= activation_bytes(program.config, 96, half=half)[0] * losses.numel() / kept < 1.2
