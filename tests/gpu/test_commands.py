"""The commands of a first hour on a GPU."""

import time
from pathlib import Path

import pytest

from memshard.launch.cli.main import main
from memshard.launch.doctor import Finding, check_installation
from memshard.models.kernels import backend
from memshard.search.evolve.child import Task, start_dna, work
from memshard.search.evolve.settings import load_settings
from tests.gpu.fake_cuda import fake_cuda, on_fake_cuda


def _first_hour(recipe: Path, folder: Path) -> list[int]:
    run = str(folder / "run")
    with fake_cuda():
        return [
            main(["train", str(recipe), "--run", run, "train.steps=2", "--debug"]),
            main(["eval", run, "--pictures", str(folder / "pictures")]),
            main(["generate", run, "--prompt", "def", "--max-tokens", "3"]),
        ]


def test_training_evaluation_with_pictures_and_generation(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert on_fake_cuda(_first_hour, recipe, tmp_path) == [0, 0, 0]
    drawn = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert drawn == ["blocks.0.png", "loss.png"]


def _findings(capability: tuple[int, int], fault: str | None) -> list[Finding]:
    with fake_cuda(capability), pytest.MonkeyPatch.context() as changed:
        changed.setattr(backend, "row_backend_fault", lambda *_: fault)
        return [found for found in check_installation() if "tables on GPU" in found.text]


@pytest.mark.parametrize(
    ("capability", "fault", "text", "bad"),
    [
        ((9, 0), None, "tables on GPU 0: Triton kernels (they agree with plain torch)", False),
        ((9, 0), "fail in torch.float32: Python.h: No such file", "python3-dev", True),
        ((7, 0), None, "tables on GPU 0: Triton kernels (they agree with plain torch)", False),
        ((7, 0), "disagree with it in torch.bfloat16", "tables on GPU 0: plain torch", False),
    ],
)
def test_doctor_tests_the_kernels_of_a_gpu(
    capability: tuple[int, int], fault: str | None, text: str, bad: bool
) -> None:
    (finding,) = on_fake_cuda(_findings, capability, fault)
    assert text in finding.text and finding.bad is bad


def _seconds(text: Path) -> float:
    sizes = ["layers=1", "length=16", "batch=4", "parameters=[12000,17000]", "eval_tokens=256"]
    words = [f"text={text}", "device=cuda", "budget=40", "hurdles=1", "step_costs=same", *sizes]
    with fake_cuda(), pytest.MonkeyPatch.context() as changed:
        # A GPU's work takes the host no time.
        changed.setattr(time, "process_time", lambda: 0.0)
        settings = load_settings(None, words)
        task = Task("train", 0, settings, 3, dna=start_dna(settings), hurdles=(None,))
        return next(event["seconds"] for event in work(task) if event["event"] == "rung")


def test_a_search_counts_the_time_of_the_gpu(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("whether tis nobler in the mind to suffer\n" * 500)
    assert on_fake_cuda(_seconds, text) > 0
