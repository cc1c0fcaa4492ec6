"""`memshard bench gpu` keeps what it has measured whatever happens, and needs no more than a GPU
machine has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memshard.bench.gpu.catalogue import NEEDS_GPU, STAGES, Stage
from memshard.bench.gpu.outcome import wrong
from memshard.bench.gpu.run import run_stages
from memshard.bench.gpu.stages.page import page
from memshard.launch.cli.main import main

ROOT = Path(__file__).parents[2]
# What memshard may use and a machine with torch, Triton, numpy and pydantic may lack.
MISSING = """\
webdataset deepspeed fairscale sentencepiece transformers tokenizers datasets lm_eval sacrebleu
wandb ray fla fbgemm_gpu reformer_pytorch product_key_memory PEER_pytorch accelerate peft lightning
fastwarc resiliparse trafilatura py3langid warcio lxml shtab pytest
"""
HOOK = f"""\
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} on this machine", name=name)
sys.meta_path.insert(0, Missing())
"""


def _stage(name: str, gpu_only: bool = False) -> Stage:
    return Stage(name, f"tests.bench.gpu_stages:{name}", 1, "for tests", gpu_only)


def test_a_stage_that_dies_hangs_or_fails_loses_nothing_but_itself(tmp_path: Path) -> None:
    stages = [_stage("crash"), _stage("hang"), _stage("fail"), _stage("well")]
    options = {"on": "cpu", "out": tmp_path, "scratch": tmp_path}
    result: dict = {"device": "cpu", "stages": {}}
    run_stages([*stages, _stage("gpu", True)], options, 0.0, tmp_path / "gpu.json", result, 5.0)
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    outcomes = {name: stage["outcome"] for name, stage in result["stages"].items()}
    assert outcomes == {
        "crash": "died",
        "hang": "over its limit",
        "fail": "failed",
        "well": "done",
        "gpu": NEEDS_GPU,
    }
    assert all("before" in result["stages"][name]["results"] for name in ("crash", "hang", "fail"))
    assert "illegal memory access" in result["stages"]["fail"]["problem"]
    assert "a line for the log" in (tmp_path / "log.txt").read_text()
    child = result["stages"]["hang"]["results"]["before"]["child"]
    assert not _lives(child)
    assert [line.partition(",")[0] for line in wrong(result)] == [
        "crash: died",
        "hang: over its limit",
        "fail: failed",
        "well: two",
    ]


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _bench(folder: Path, *arguments: str, timeout: float) -> dict:
    """Run the command where `MISSING` cannot be imported, by any process."""
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    command = [sys.executable, "-m", "memshard", "bench", "gpu", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(folder / "out"), *arguments],
        env={**os.environ, "PYTHONPATH": f"{hook}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out/gpu.json").read_text())


def test_stages_run_alone_and_without_packages_of_other_commands(tmp_path: Path) -> None:
    result = _bench(tmp_path, "--only", "kernels", "page", timeout=120)
    assert not wrong(result) and list(result["stages"]) == ["kernels", "page"]
    assert "rows of 64, bf16" in result["stages"]["kernels"]["results"]
    assert "a rehearsal on a CPU" in (tmp_path / "out/gpu.md").read_text()


@pytest.mark.slow
def test_the_whole_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    """All stages in two minutes, of which none says anything of a GPU."""
    result = _bench(tmp_path, "--minutes", "2", timeout=400)
    assert not wrong(result), wrong(result)
    assert list(result["stages"]) == list(STAGES)
    outcomes = {name: stage["outcome"] for name, stage in result["stages"].items()}
    assert outcomes.pop("waits") == NEEDS_GPU and set(outcomes.values()) == {"done"}
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    # What a machine that is lent may hand back.
    assert len(files) <= 8 and {"gpu.json", "gpu.md", "log.txt"} <= set(files)


def test_a_gpu_is_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 2
    assert "--device cpu rehearses" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_says_what_is_not_as_it_should_be() -> None:
    kernels = {"rows": {"gather_sum": 2.0, "ok": False}, "search": {"skipped": "no kernel"}}
    stages = {"kernels": {"outcome": "died", "problem": "exit code -11", "results": kernels}}
    text = page({"device": "cuda", "stages": stages}, [])
    assert "2 are not as they should be" in text
    assert "- kernels: died, exit code -11\n- kernels: rows\n" in text
    assert "| rows | **not as it should be** gather_sum 2 |\n| search | no kernel |" in text
