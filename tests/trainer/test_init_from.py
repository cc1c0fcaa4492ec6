"""A run that begins with another run's weights: memory layers added, tables grown."""

import shutil
from pathlib import Path

import pytest
import torch

from memshard.models.memory.product_key import slot_rows
from memshard.trainer.loop import evaluate_run
from memshard.trainer.resume import save
from tests.distributed import run_distributed
from tests.trainer.tiny_run import TABLE, assert_same, checkpoint_state, numbers, prepare, train_run

DENSE = "model.memory.layers=[]"
LAYOUTS = {
    "rows": ("parallel.layout=rows", "train.zero=1"),
    "columns": ("parallel.layout=columns",),
    "copies": ("parallel.memory=1",),
    "tensor": ("parallel.tensor=2", "parallel.layout=tensor-columns"),
}
GROWN = ("model.memory.keys=13", "tables.semantics=row-step")
TOLERANCE = 0.005
"""What a few more keys may do to a loss of 3.6; sub-keys of full length do 0.006."""


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a dense run, one with a memory, and one with gated memories in fp16;
    return their folder.
    """
    folder = tmp_path_factory.mktemp("init_from")
    train_run(recipe, folder / "dense", DENSE)
    train_run(recipe, folder / "memory", "data.order=contiguous")  # as TOLERANCE was measured
    half = ("model.memory.gate=true", "model.memory.share=false", "tables.dtype=fp16")
    train_run(recipe, folder / "fp16", *half)
    return folder


def _begin(
    rank: int, world: int, recipe: Path, source: Path, folder: Path, *overrides: str
) -> float:
    """Return the held-out loss before the first step of a run that begins with `source`; its
    checkpoint is saved as step 0.
    """
    run = prepare(recipe, folder, f"init_from={source}", *overrides)
    loss = evaluate_run(run).loss
    assert run.progress.step == 0
    save(run)
    return loss


def _grow(rank: int, world: int, recipe: Path, source: Path, folder: Path) -> dict[str, float]:
    """Return the losses of a table with more keys in all layouts."""
    return {
        name: _begin(rank, world, recipe, source, folder / name, *GROWN, *settings)
        for name, settings in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def grown(trained: Path, recipe: Path) -> dict[str, float]:
    """Return losses by layout; the runs are in the folder `trained`."""
    one = _begin(0, 1, recipe, trained / "memory", trained / "one", *GROWN)
    both = run_distributed(_grow, 2, recipe, trained / "memory", trained)
    assert both[0] == both[1]
    return {"one": one, **both[0]}


@pytest.mark.parametrize(
    "overrides",
    [(), ("model.memory.gate=true", "model.memory.value_dim=24"), ("model.memory.kind=peer",)],
    ids=str,
)
@pytest.mark.parametrize("residual", ["pre", "post"])
def test_memories_added_to_a_dense_model_change_nothing_and_learn(
    overrides: tuple[str, ...], residual: str, recipe: Path, tmp_path: Path
) -> None:
    norm = f"model.residual={residual}"
    train_run(recipe, tmp_path / "dense", DENSE, norm)
    add = ("model.memory.mode=add", norm, *overrides)
    loss = _begin(0, 1, recipe, tmp_path / "dense", tmp_path / "added", *add)
    assert loss == numbers(tmp_path / "dense", "eval/loss")[10]
    start = checkpoint_state(tmp_path / "added")
    # The first run may go; the second one resumes without it.
    shutil.rmtree(tmp_path / "dense")
    train_run(recipe, tmp_path / "added", *add, f"init_from={tmp_path / 'dense'}", stop_at=4)
    train_run(recipe, tmp_path / "added", *add)
    assert numbers(tmp_path / "added", "eval/loss")[10] < loss
    end = checkpoint_state(tmp_path / "added")
    for name, value in end.items():
        if name.startswith("model.") and not name.endswith(("norm.bias",)):
            assert not torch.equal(value, start[name]), name


NGRAM = (
    "model.ngram.layers=[0,1]",
    "model.ngram.heads=2",
    "model.ngram.rows=13",
    "model.ngram.value_dim=4",
)


def test_n_grams_added_to_a_model_change_nothing_and_keep_their_rows(
    trained: Path, recipe: Path, tmp_path: Path
) -> None:
    source = trained / "memory"
    loss = _begin(0, 1, recipe, source, tmp_path / "added", *NGRAM)
    assert loss == numbers(source, "eval/loss")[10]
    before, after = checkpoint_state(source), checkpoint_state(tmp_path / "added")
    assert not after["model.blocks.0.ngram.values.weight"].any()
    kept = {name for name in before if name.startswith(("model.", "exp_avg", "last_step."))}
    assert_same({name: before[name] for name in kept}, {name: after[name] for name in kept})
    train_run(recipe, tmp_path / "added", *NGRAM, f"init_from={source}")
    trained_rows = checkpoint_state(tmp_path / "added")["model.blocks.0.ngram.values.weight"]
    assert trained_rows.any()
    _begin(0, 1, recipe, tmp_path / "added", tmp_path / "again", *NGRAM)
    again = checkpoint_state(tmp_path / "again")
    assert torch.equal(again["model.blocks.0.ngram.values.weight"], trained_rows)
    with pytest.raises(ValueError, match="of another size n-grams have other rows"):
        _begin(0, 1, recipe, tmp_path / "added", tmp_path / "x", *NGRAM, "model.ngram.rows=29")
    shared = (*NGRAM, "model.ngram.share=true", "model.ngram.layers=[0]")
    train_run(recipe, tmp_path / "shared", *shared)
    with pytest.raises(ValueError, match="model.ngram.layers adds a layer to the readers"):
        _begin(0, 1, recipe, tmp_path / "shared", tmp_path / "x", *NGRAM, "model.ngram.share=true")


def test_a_memory_may_take_the_place_of_a_feedforward(
    trained: Path, recipe: Path, tmp_path: Path
) -> None:
    _begin(0, 1, recipe, trained / "dense", tmp_path / "replaced")
    before, after = checkpoint_state(trained / "dense"), checkpoint_state(tmp_path / "replaced")
    assert not after[f"model.{TABLE}.weight"].any()
    kept = {
        name
        for name in before
        if name.startswith(("model.", "exp_avg", "step.")) and ".feedforward." not in name
    }
    assert len(kept) > 20
    assert_same({name: before[name] for name in kept}, {name: after[name] for name in kept})


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_convolutions_added_to_a_model_change_nothing_and_learn(
    ranks: int, trained: Path, recipe: Path, tmp_path: Path
) -> None:
    settings = (
        recipe,
        trained / "memory",
        tmp_path / "run",
        "model.mixer.convolution=3",
        f"parallel.tensor={ranks}",
    )
    loss = _begin(0, 1, *settings) if ranks == 1 else run_distributed(_begin, ranks, *settings)[0]
    assert loss == pytest.approx(
        numbers(trained / "memory", "eval/loss")[10], rel=0 if ranks == 1 else 1e-6
    )
    name = "model.blocks.0.mixer.convolutions.query.weight"
    assert checkpoint_state(tmp_path / "run")[name].tolist() == [1, 0, 0] * 16
    train_run(
        recipe,
        tmp_path / "run",
        "model.mixer.convolution=3",
        f"init_from={trained / 'memory'}",
        stop_at=2,
    )
    assert checkpoint_state(tmp_path / "run")[name].view(-1, 3).all()


def test_a_grown_table_keeps_its_slots(
    grown: dict[str, float], trained: Path, recipe: Path
) -> None:
    before, after = checkpoint_state(trained / "memory"), checkpoint_state(trained / "one")
    old_loss = numbers(trained / "memory", "eval/loss")[10]
    assert grown["one"] == pytest.approx(old_loss, abs=TOLERANCE)
    assert after["table_steps"] == before["table_steps"] == {TABLE: 10}

    i1, i2 = torch.meshgrid(torch.arange(13), torch.arange(13), indexing="ij")
    old = (i1 < 8) & (i2 < 8)
    moved = slot_rows(i1[old], i2[old], 13)
    for kind in ("model", "exp_avg", "exp_avg_sq", "last_step"):
        name = f"{kind}.{TABLE}.weight"
        assert before[name].any()
        assert torch.equal(after[name][moved], before[name][slot_rows(i1[old], i2[old], 8)]), name
        assert not after[name][slot_rows(i1[~old], i2[~old], 13)].any(), name
    assert after[f"row_step.{TABLE}.weight"].eq(10).all()
    for layer in (0, 1):
        keys = [state[f"model.blocks.{layer}.memory.sub_keys.weight"] for state in (before, after)]
        assert torch.equal(keys[1][:, :, :8], keys[0])
        lengths = [part.square().mean((2, 3)).sqrt() for part in (keys[1][:, :, 8:], keys[0])]
        torch.testing.assert_close(lengths[0], 0.5 * lengths[1])
        moments = [
            state[f"exp_avg.blocks.{layer}.memory.sub_keys.weight"] for state in (before, after)
        ]
        assert (
            torch.equal(moments[1][:, :, :8], moments[0])
            and moments[0].any()
            and not moments[1][:, :, 8:].any()
        )
    train_run(recipe, trained / "one", *GROWN, f"init_from={trained / 'memory'}")
    assert numbers(trained / "one", "eval/loss")[10] < old_loss


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_and_layouts_grow_it_alike(
    layout: str, grown: dict[str, float], trained: Path
) -> None:
    assert grown[layout] == pytest.approx(grown["one"], rel=1e-6)
    assert_same(
        checkpoint_state(trained / layout),
        checkpoint_state(trained / "one/checkpoints/step-00000000"),
    )


def test_values_come_from_the_fp32_copy_and_go_to_it(
    trained: Path, recipe: Path, tmp_path: Path
) -> None:
    half = ("model.memory.gate=true", "model.memory.share=false", "tables.dtype=fp16")
    for source, overrides in (
        ("fp16", half[:2]),
        ("fp16", half),
        ("fp16", (*half, "model.memory.keys=9")),
    ):
        _begin(0, 1, recipe, trained / source, tmp_path / str(len(overrides)), *overrides)
    before = checkpoint_state(trained / "fp16")
    wide, same, grown = (checkpoint_state(tmp_path / name) for name in "234")
    for layer in (0, 1):
        name = f"blocks.{layer}.memory.values.weight"
        assert torch.equal(wide[f"model.{name}"], before[f"master.{name}"])
        assert torch.equal(same[f"model.{name}"], before[f"model.{name}"])
        assert torch.equal(same[f"master.{name}"], before[f"master.{name}"])
        assert (
            torch.equal(grown[f"model.{name}"], grown[f"master.{name}"].half())
            and grown[f"model.{name}"].any()
        )


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        (
            "memory",
            ("model.memory.keys=7",),
            r"sub_keys.weight is \[2, 2, 8, 4\] in .* \[2, 2, 7, 4\] here: tables can only grow",
        ),
        (
            "memory",
            ("model.dim=24",),
            r"embedding.weight is \[300, 16\] in .* and \[300, 24\] here",
        ),
        (
            "memory",
            ("model.memory.heads=3",),
            r"blocks.0.memory.query.weight is \[16, 16\] in .*and \[24, 16\] here",
        ),
        ("memory", ("model.layers=3",), r"has no model.blocks.2.mixer"),
        (
            "memory",
            ("model.layers=1", "model.memory.layers=[0]"),
            r"has model.blocks.1.\S+, which this model lacks",
        ),
        ("memory", (DENSE,), r"has model.blocks.0.memory.\S+, which this model lacks"),
        ("dense", (DENSE, "model.tie_head=false"), "has no model.head.weight"),
        (
            "fp16",
            ("model.memory.share=false",),
            r"has model.blocks.0.memory.\S+, which this model lacks",
        ),
        ("none", (), "none does not exist"),
    ],
)
def test_what_does_not_fit_is_named(
    source: str,
    overrides: tuple[str, ...],
    message: str,
    trained: Path,
    recipe: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        _begin(0, 1, recipe, trained / source, tmp_path / "new", *overrides)
    assert not (tmp_path / "new").exists()


def test_a_trained_table_gets_no_reader_with_fresh_keys(recipe: Path, tmp_path: Path) -> None:
    train_run(
        recipe, tmp_path / "one", "model.memory.layers=[0]", "model.memory.mode=add", stop_at=2
    )
    with pytest.raises(
        ValueError, match="layer 1 to the readers of a table that the checkpoint has trained"
    ):
        _begin(0, 1, recipe, tmp_path / "one", tmp_path / "two", "model.memory.mode=add")
    alone = _begin(
        0,
        1,
        recipe,
        tmp_path / "one",
        tmp_path / "two",
        "model.memory.mode=add",
        "model.memory.share=false",
    )
    assert alone == _begin(
        0,
        1,
        recipe,
        tmp_path / "one",
        tmp_path / "same",
        "model.memory.layers=[0]",
        "model.memory.mode=add",
    )
