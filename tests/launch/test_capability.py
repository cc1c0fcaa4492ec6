"""What start-up says of GPUs that this torch was not built for, and which options
its launcher has.
"""

import re
from pathlib import Path
from typing import get_args

import pytest

from memshard.launch.env import lacks_kernels
from memshard.launch.launchers.slurm import Flavour, Job, render
from memshard.launch.launchers.start import torchrun_options
from tests.launch.test_scripts import START, V100

ROOT = Path(__file__).parents[2]
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "built", "advice"),
    [
        ((7, 0), CUDA_12_6, None),
        ((7, 0), CUDA_13, "CUDA 12.6 (docs/volta.md)"),
        ((7, 5), CUDA_13, None),
        ((8, 9), CUDA_13, None),
        ((9, 0), [*CUDA_13[:3], "sm_90a"], None),
        ((10, 3), CUDA_13, None),
        ((12, 0), CUDA_12_6, "install a newer torch"),
        ((12, 0), [*CUDA_12_6, "compute_90"], None),
        ((7, 0), ["gfx90a"], None),
    ],
)
def test_capability_against_build(
    capability: tuple[int, int], built: list[str], advice: str | None
) -> None:
    problem = lacks_kernels(capability, built)
    assert problem is None if advice is None else problem is not None and advice in problem
    assert (ROOT / "docs/volta.md").exists()


def test_options_of_newer_torchrun_are_left_out_before() -> None:
    assert torchrun_options(30, "2.12.1+cu126") == []
    for version in ("2.13.0", "2.13.0+cu126", "3.0.0"):
        assert torchrun_options(60, version)[1] == "--shutdown-timeout=60"


def test_scripts_that_restart_share_no_store() -> None:
    scripts = [
        render(Job(start=START, cluster=V100, flavour=flavour)) for flavour in get_args(Flavour)
    ]
    restarting = [script for script in scripts if "--max-restarts" in script]
    assert restarting
    for script in restarting:
        assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in script


def test_lower_bounds_are_versions_that_run_here() -> None:
    """The tests run with constraints.txt; a bound that names another version there
    was never run.
    """
    exact = dict(
        re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    exact = {name.lower().replace("_", "-"): version for name, version in exact.items()}
    bounds = re.findall(r'"([\w.-]+)>=([\d.]+)', (ROOT / "setup.py").read_text())
    assert len(bounds) > 15
    for name, bound in bounds:
        version = exact[name.lower().replace("_", "-")]
        assert f"{version}.".startswith(f"{bound}."), (
            f"setup.py asks for {name}>={bound}, the tests run {version}"
        )
