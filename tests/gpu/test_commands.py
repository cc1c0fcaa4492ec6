"""The commands of a first hour on a GPU."""

from pathlib import Path

import pytest

from memshard.launch.cli.main import main
from memshard.launch.doctor import Finding, check_installation
from memshard.models.kernels import backend
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
        ((7, 0), None, "tables on GPU 0: plain torch", False),
    ],
)
def test_doctor_tests_the_kernels_of_a_gpu(
    capability: tuple[int, int], fault: str | None, text: str, bad: bool
) -> None:
    (finding,) = on_fake_cuda(_findings, capability, fault)
    assert text in finding.text and finding.bad is bad
