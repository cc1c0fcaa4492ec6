"""Whole runs whose ranks share matrices and sequences: the numbers of one process, checkpoints for
any layout, clear refusals.
"""

import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import memshard
from memshard.launch.cli.main import main
from memshard.models.config import MemoryConfig, MixerConfig, ModelConfig
from memshard.models.decode.generate import generate
from memshard.models.memory.table import find_tables
from memshard.models.transformer import Transformer
from memshard.parallel.apply import apply, losses_on
from memshard.parallel.mesh import build_mesh
from memshard.parallel.tables.layouts import Lookup
from memshard.trainer.cost.activations import activation_bytes
from memshard.trainer.cost.layout_choice import choose_layout
from memshard.trainer.cost.parameters import count_parameters
from memshard.trainer.resume import checkpoint_tensors
from tests.distributed import run_distributed
from tests.trainer.test_precision import overflow_on_one_rank
from tests.trainer.tiny_run import TABLE, assert_same, checkpoint_state, numbers, prepare, train_run

# A vocabulary that does not divide by 2; layer 0 keeps its feedforward.
SETTINGS = (
    "model.memory.layers=[1]",
    "model.vocab_size=301",
    "train.eval_every=5",
    "train.save_every=5",
    "train.keep=9",
)
TWO, COLUMNS = "parallel.tensor=2", "parallel.layout=tensor-columns"
Runs = tuple[Path, list[dict[str, Any]]]
VALUES = TABLE.replace("0", "1")


def _leave() -> None:
    sys.modules["memshard.parallel.tensor"].leave()  # type: ignore[attr-defined]


def _two_ranks(rank: int, world: int, recipe: Path, folder: Path) -> dict[str, Any]:
    """Train on two ranks; return what is refused, and what backward keeps."""
    train_run(recipe, folder / "rows", *SETTINGS, TWO)
    train_run(
        recipe,
        folder / "columns",
        *SETTINGS,
        TWO,
        COLUMNS,
        "train.micro_batch=4",
        "model.memory.query_norm=layer",
    )
    # On from what one process saved.
    train_run(recipe, folder / "resumed", *SETTINGS, TWO)
    train_run(recipe, folder / "odd", *SETTINGS, TWO, "data.length=31")
    scales = overflow_on_one_rank(rank, world, recipe, folder / "overflow", TWO)
    results = {
        "scales": scales,
        "refused": _refusals(recipe, folder),
        "kept": _kept_bytes(rank, world),
    }
    _leave()
    return results


def _refusals(recipe: Path, folder: Path) -> list[str]:
    said = []
    for settings in (
        ["model.mixer.heads=1"],
        ["model.memory.layers=[1]", "model.feedforward.hidden=31"],
        ["parallel.memory=1"],
    ):
        try:
            prepare(recipe, folder / "refused", TWO, *settings)
        except ValueError as error:
            said.append(str(error))
    try:
        prepare(recipe, folder / "refused", "parallel.tensor=3")
    except ValueError as error:
        said.append(str(error))
    return said


def _kept_bytes(rank: int, world: int) -> list[tuple[float, float]]:
    """Return, for some models in fp32 and bf16, the bytes that a rank keeps for backward,
    and the estimate.
    """
    batch, length, rows = 16, 64, []
    memory = MemoryConfig(layers=(1,), keys=32, heads=4, topk=8, key_dim=64)
    model = ModelConfig(vocab_size=100, max_length=64, layers=3, dim=64, mixer=MixerConfig(heads=4))
    models = [model, replace(model, norm="rms", tie_head=False), replace(model, memory=memory)]
    for config, half in product(models, (False, True)):
        spread = Transformer(config).train()
        mesh = build_mesh("cpu", None, world)
        apply(spread, mesh)
        weights = {
            p.untyped_storage().data_ptr()
            for p in [*spread.parameters(), *(table.weight for _, table in find_tables(spread))]
        }
        saved: dict[int, torch.Tensor] = {}

        def keep(
            x: torch.Tensor, weights: set[int] = weights, saved: dict[int, torch.Tensor] = saved
        ) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                saved[x.untyped_storage().data_ptr()] = x
            return x

        tokens = torch.randint(100, (batch, length), generator=torch.Generator().manual_seed(0))
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            losses_on(mesh)(spread(tokens)[0], tokens).sum()
        measured = sum(x.untyped_storage().nbytes() for x in saved.values())
        if half:  # the copies of weights, which the estimate counts as weights
            counted = count_parameters(config)
            measured -= 2 * (counted.active - counted.split + counted.split // world)
        layout = choose_layout("rows", Lookup(world, config.dim, memory.heads * memory.topk))
        rows.append(
            (
                measured,
                batch
                * length
                * activation_bytes(config, length, {"memory": layout}, half=half, tensor=world)[0],
            )
        )
    return rows


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("tensor")
    train_run(recipe, folder / "alone", *SETTINGS)
    train_run(
        recipe,
        folder / "alone, layer",
        *SETTINGS,
        "train.micro_batch=4",
        "model.memory.query_norm=layer",
    )
    train_run(recipe, folder / "alone, odd", *SETTINGS, "data.length=31")
    shutil.copytree(folder / "alone", folder / "resumed")
    shutil.rmtree(folder / "resumed/checkpoints/step-00000010")
    return folder, run_distributed(_two_ranks, 2, recipe, folder)


@pytest.mark.parametrize(
    ("run", "alone"),
    [("rows", "alone"), ("resumed", "alone"), ("columns", "alone, layer"), ("odd", "alone, odd")],
)
def test_the_numbers_are_those_of_one_process(runs: Runs, run: str, alone: str) -> None:
    folder, _ = runs
    # Which slots are read, and so how evenly, turns on the last bits of fp32 scores.
    rough = {f"{VALUES}/{key}": 2e-2 for key in ("usage", "kl_weighted", "touched", "duplicates")}
    for key, tolerance in (
        {"train/loss": 1e-4, "train/grad_norm": 1e-3, "eval/loss": 1e-4} | rough
    ).items():
        expected = numbers(folder / alone, key)
        assert len(expected) >= 2
        assert numbers(folder / run, key) == pytest.approx(expected, rel=tolerance), key


def test_what_two_ranks_saved_loads_on_one(runs: Runs, recipe: Path, tmp_path: Path) -> None:
    folder, _ = runs
    shutil.copytree(folder / "rows", tmp_path / "copy")
    run = prepare(recipe, tmp_path / "copy", *SETTINGS)
    saved = checkpoint_state(folder / "rows")
    assert_same(checkpoint_tensors(run), {name: saved[name] for name in checkpoint_tensors(run)})
    loaded = memshard.load_model(folder / "columns")
    assert generate(loaded.model, torch.tensor([[1, 2, 3]]), 4).shape == (1, 4)


def test_an_overflow_on_one_rank_skips_the_step_on_both(runs: Runs) -> None:
    for rank in runs[1]:
        assert rank["scales"] == [65536.0, 32768.0, 16384.0]


def test_every_way_to_lay_out_starts_from_the_same_weights(runs: Runs, recipe: Path) -> None:
    """Weights are drawn as if there was one rank."""
    folder, _ = runs
    first = [numbers(folder / run, "train/loss")[1] for run in ("alone", "rows")]
    assert first[1] == pytest.approx(first[0], rel=1e-6)


def test_cached_decoding_is_refused(runs: Runs) -> None:
    loaded = memshard.load_model(runs[0] / "rows")
    loaded.model.share_sequence = lambda tokens, ctx: (tokens, ctx)
    with pytest.raises(ValueError, match="memshard.load_model"):
        generate(loaded.model, torch.tensor([[1, 2, 3]]), 4)


def test_what_does_not_divide_is_refused(runs: Runs, recipe: Path, tmp_path: Path) -> None:
    for rank in runs[1]:
        heads, hidden, memory, ranks = rank["refused"]
        assert "model.mixer.heads is 1" in heads and "set model.mixer.heads to 2" in heads
        assert "model.feedforward.hidden is 31" in hidden and "30 or 32" in hidden
        assert "parallel.memory is 1 and parallel.tensor 2" in memory
        assert "parallel.tensor is 3, which does not divide the number of ranks, 2" in ranks
    with pytest.raises(ValueError, match="tensor-columns, which needs parallel.tensor"):
        prepare(recipe, tmp_path, COLUMNS)


def test_without_fairscale_the_extra_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fairscale.nn.model_parallel", None)
    monkeypatch.delitem(sys.modules, "memshard.parallel.tensor", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'memshard\[tensor-parallel\]'"):
        import memshard.parallel.tensor  # noqa: F401


def test_activations_of_a_rank_are_what_autograd_saves(runs: Runs) -> None:
    for rank in runs[1]:
        for measured, predicted in rank["kept"]:
            assert predicted == pytest.approx(measured, rel=0.06)


def test_plan_shows_the_arrangement(capsys: pytest.CaptureFixture[str]) -> None:
    plan: list[Any] = ["plan", "billion", "--world", "8", "--device", "v100-32g", TWO]
    assert main(plan) == 0
    assert "groups of 2 that share matrices and sequences; groups: 4" in capsys.readouterr().out
