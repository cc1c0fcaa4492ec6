"""The DeepSpeed engine does what the torch engine does, and takes its checkpoints."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from memshard.launch.cli.main import main
from memshard.trainer.config.load import load_recipe
from memshard.trainer.cost.dense_bytes import dense_bytes
from memshard.trainer.engine.deepspeed import DeepSpeedEngine
from memshard.trainer.optim.dense.kinds import DENSE_KINDS
from memshard.trainer.resume import save
from memshard.trainer.run_folder import write_config
from memshard.trainer.step import train_step
from tests.distributed import run_distributed
from tests.trainer.test_precision import overflow_on_one_rank
from tests.trainer.tiny_run import assert_same, checkpoint_state, prepare, train_run

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs memshard[deepspeed]")
DEEPSPEED = "train.engine=deepspeed"
MICRO = ("train.micro_batch=2", "train.clip=0.1", "optimizer.eps=1e-3")
"""With a smaller eps, Adam makes steps of gradients that are nothing but rounding."""
STAGES = (
    ("train.engine=torch",),
    (DEEPSPEED, "train.zero=0"),
    (DEEPSPEED, "train.zero=1"),
    (DEEPSPEED, "train.zero=2"),
    (DEEPSPEED, "train.zero=2", "train.offload=true"),
    (DEEPSPEED, "train.zero=1", "parallel.tensor=2"),
)

OTHERS = {
    "fp32": (DEEPSPEED, "train.zero=2"),
    "fp16": (DEEPSPEED, "train.zero=1", "train.precision=fp16"),
    "tensor": (DEEPSPEED, "train.zero=1", "parallel.tensor=2"),
    "torch tensor": ("train.zero=1", "parallel.tensor=2"),
}


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on a CPU without instructions for it."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def _all_stages(rank: int, world: int, recipe: Path, folder: Path) -> list[dict[str, Any]]:
    """Return losses, norms and all weights after three steps, of every engine and stage; check that
    DeepSpeed keeps the bytes foreseen.
    """
    results = []
    for settings in STAGES:
        run = prepare(
            recipe, folder / "-".join(settings), *MICRO, "model.memory.query_norm=layer", *settings
        )
        outcomes = [train_step(run) for _ in range(3)]
        numbers = torch.tensor([(outcome.loss, outcome.norm, outcome.rate) for outcome in outcomes])
        if (
            isinstance(run.engine, DeepSpeedEngine)
            and run.engine.shards
            and run.data_ranks == world
        ):
            masters = run.engine.zero.single_partition_of_fp32_groups
            bytes_of = [
                sum(t.nbytes for t in (*run.engine.parameters, *masters)),
                2 * sum(t.nbytes for t in masters),
            ]
            sizes = [p.numel() for p in run.engine.parameters]
            here, in_host = dense_bytes(
                run.recipe.train,
                DENSE_KINDS[run.recipe.optimizer.kind],
                sum(sizes),
                max(sizes),
                world,
                half=False,
            )
            predicted = [
                here.get(key, 0) + in_host.get(key, 0) for key in ("dense_weights", "dense_moments")
            ]
            assert bytes_of == pytest.approx(predicted, rel=0.01), settings
        whole = (
            {}
            if run.data_ranks < world
            else {name: value.clone() for name, value in run.model.state_dict().items()}
        )
        results.append({"numbers": numbers, **whole})
    return results


def _there_and_back(rank: int, world: int, recipe: Path, folder: Path) -> None:
    """Resume a checkpoint of the torch engine with others and save it again; then take two more
    steps, and go on with torch.
    """
    train_run(recipe, folder / "torch", *MICRO, stop_at=4)
    allow_fp16()
    for name, settings in OTHERS.items():
        run = prepare(recipe, folder / "torch", *MICRO, *settings)
        assert run.progress.step == 4
        for step, steps in (("4", 0), ("6", 2)):
            for _ in range(steps):
                train_step(run)
            run.folder = folder / name / step
            if rank == 0:
                write_config(run.folder, run.recipe)
            save(run)
        assert train_run(recipe, folder / name / "6", *MICRO, stop_at=8)["step"] == 8
    settings = (*MICRO, DEEPSPEED, "train.zero=2", f"init_from={folder / 'torch'}")
    save(prepare(recipe, folder / "begun", *settings))
    train_run(recipe, folder / "torch", *MICRO, stop_at=6)


def test_all_stages_train_as_torch_does(recipe: Path, tmp_path: Path) -> None:
    first, second = run_distributed(_all_stages, 2, recipe, tmp_path, timeout=300)
    for settings, actual, other in zip(STAGES, first, second, strict=True):
        expected = {name: first[0][name] for name in actual}
        torch.testing.assert_close(
            actual, expected, rtol=1e-5, atol=1e-6, msg=lambda text, s=settings: f"{s}: {text}"
        )
        assert torch.equal(actual["numbers"], other["numbers"])
    assert (tmp_path / "-".join(STAGES[2]) / "deepspeed.json").exists()


def test_a_checkpoint_goes_from_engine_to_engine_and_back(recipe: Path, tmp_path: Path) -> None:
    run_distributed(_there_and_back, 2, recipe, tmp_path, timeout=300)
    before = checkpoint_state(tmp_path / "torch/checkpoints/step-00000004")
    learned = {
        name: value
        for name, value in before.items()
        if isinstance(value, torch.Tensor) and "key_" not in name
    }
    for name in (*(f"{name}/4" for name in OTHERS), "begun"):
        after = checkpoint_state(tmp_path / name)
        assert_same({name: after[name] for name in learned}, learned)
        assert name == "begun" or after["progress"] == before["progress"]
    torch_6, deepspeed_6 = (
        checkpoint_state(tmp_path / name) for name in ("torch", "fp32/6/checkpoints/step-00000006")
    )
    for name, value in torch_6.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                deepspeed_6[name],
                value,
                rtol=1e-4,
                atol=1e-6,
                msg=lambda text, n=name: f"{n}: {text}",
            )


def _stream_dtypes(rank: int, world: int, recipe: Path, folder: Path) -> list[torch.dtype]:
    settings = (
        DEEPSPEED,
        "train.zero=1",
        "train.precision=bf16",
        "parallel.tensor=2",
        "model.position=rotary",
        "model.memory.layers=[]",
    )
    run = prepare(recipe, folder, *settings)
    dtypes: list[torch.dtype] = []
    for block in run.model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    train_step(run)
    return dtypes


def test_the_residual_stream_of_tensor_parallel_ranks_is_fp32(recipe: Path, tmp_path: Path) -> None:
    assert run_distributed(_stream_dtypes, 2, recipe, tmp_path / "run") == [[torch.float32] * 2] * 2


def _overflow(rank: int, world: int, recipe: Path, folder: Path) -> list[list[float]]:
    allow_fp16()
    return [
        overflow_on_one_rank(rank, world, recipe, folder / zero, DEEPSPEED, f"train.zero={zero}")
        for zero in ("1", "2")
    ]


def test_an_overflow_on_one_rank_skips_the_step_under_deepspeed_too(
    recipe: Path, tmp_path: Path
) -> None:
    assert (
        run_distributed(_overflow, 2, recipe, tmp_path, timeout=300)
        == [[[65536.0, 32768.0, 16384.0]] * 2] * 2
    )


@pytest.mark.slow
def test_one_process_leaves_standard_output_alone(recipe: Path, tmp_path: Path) -> None:
    argv = [
        "train",
        str(recipe),
        "--run",
        str(tmp_path / "run"),
        DEEPSPEED,
        "train.zero=1",
        "train.steps=2",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "memshard", *argv], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2
    assert "Traceback" not in done.stderr and "arning" not in done.stderr, done.stderr


def test_settings_that_cannot_work_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for override, message in (
        ("train.zero=2", "set train.engine=deepspeed"),
        ("train.offload=true", "needs train.engine=deepspeed"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(str(recipe), [override])
    argv = ["train", str(recipe), "--run", str(tmp_path / "run"), DEEPSPEED, "train.precision=bf16"]
    assert main(argv) == 2
    assert "DeepSpeed is wrong in 16-bit arithmetic: set train.zero=1" in capsys.readouterr().err


def test_a_missing_package_is_named(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert main(["train", str(recipe), "--run", str(tmp_path / "run"), DEEPSPEED]) == 2
    assert "pip install 'memshard[deepspeed]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
