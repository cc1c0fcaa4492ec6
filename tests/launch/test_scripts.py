"""Scripts as they are rendered: the ready-made ones in memshard/launch/examples are the golden
files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memshard
from memshard.launch.cli.main import main
from memshard.launch.launchers.cluster import Cluster, load_cluster
from memshard.launch.launchers.slurm import Job, render
from memshard.launch.launchers.start import Start

EXAMPLES = Path(memshard.__file__).parent / "launch/examples"
START = Start("lample2019", (), "runs/lample2019")
V100 = {"venv": ".venv", "cpus": 5, "partition": "gpu", "account": "my-account"}
READY_MADE = {
    "1-gpu.sh": Job(start=START, cluster=Cluster(gpus=1, **V100)),
    "4-gpus.sh": Job(start=START, cluster=Cluster(gpus=4, **V100)),
    "32-gpus.sh": Job(
        start=START,
        cluster=Cluster(nodes=4, gpus=8, interface="ib0", constraint="v100-32g", **V100),
    ),
    "32-gpus-torchrun.sh": Job(
        start=START, cluster=Cluster(nodes=4, gpus=8, interface="ib0", **V100), flavour="torchrun"
    ),
    "32-gpus-deepspeed.sh": Job(
        start=START, cluster=Cluster(nodes=4, gpus=8, interface="ib0", **V100), flavour="deepspeed"
    ),
}
"""Written anew by `python -m tests.launch.test_scripts`."""


@pytest.mark.parametrize("name", READY_MADE)
def test_examples_are_what_is_rendered(name: str) -> None:
    assert (EXAMPLES / name).read_text() == render(READY_MADE[name])
    assert subprocess.run(["bash", "-n", EXAMPLES / name]).returncode == 0


def test_there_are_no_other_examples() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == set(READY_MADE)


def test_turns_do_not_requeue_themselves() -> None:
    cluster = Cluster(
        container="apptainer exec image.sif",
        setup=("module load cuda",),
        env={"NCCL_DEBUG": "WARN x"},
    )
    script = render(Job(start=START, cluster=cluster, turns=5, workdir="/home/a b"))
    for line in (
        "#SBATCH --array=1-5%1",
        "#SBATCH --chdir=/home/a b",
        "#SBATCH --output=runs/lample2019/log/slurm-%A_%a.out",
    ):
        assert f"\n{line}\n" in script
    assert "\nmodule load cuda\n" in script and "\nexport NCCL_DEBUG='WARN x'\n" in script
    assert (
        "\nsrun --kill-on-bad-exit=1 apptainer exec image.sif python -m memshard train lample2019 "
        in script
    )
    assert "scontrol requeue" not in script and "--gpus-per-node" not in script


def test_facts_of_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "partition: gpu\ngpus: 4\ntime: '2:00:00'\nsetup: [module load a]\nenv: {A: 1}\n"
    )
    cluster = load_cluster(path, {"gpus": 8, "nodes": None})
    assert cluster == Cluster(
        partition="gpu", gpus=8, time="2:00:00", setup=("module load a",), env={"A": "1"}
    )
    assert cluster.ranks_per_node == 8
    for text, message in (
        ("partion: a\n", "unknown key 'partion'; did you mean 'partition'?"),
        ("time: 2:00:00\n", "time is 7200; expected str, quoted, such as time: '24:00:00'"),
        ("gpus: many\n", "gpus is 'many'; expected int"),
        ("- a\n", "expected `key: value` lines"),
        ("nodes: 0\n", "nodes is 0; it must be at least 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            load_cluster(path, {})


def test_submitting_keeps_code_and_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """sbatch here is a script that prints its arguments' number: SLURM itself is met in
    test_cluster.py.
    """
    fake = tmp_path / "bin/sbatch"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" >> calls\nwc -l < calls\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("data: {path: shards}\ntrain: {steps: 7}\n")
    assert (
        main(
            [
                "launch",
                "slurm",
                "mine.yaml",
                "model.layers=3",
                "--chain",
                "3",
                "--after",
                "77",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capfd.readouterr().out)
    assert result["jobs"] == ["1", "2", "3"]
    script = tmp_path / "runs/mine/submit.sh"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"--parsable --dependency=afterany:{after} {script}" for after in (77, 1, 2)]
    text = script.read_text()
    assert (
        f"{sys.executable} -m memshard train {tmp_path}/runs/mine/recipe.yaml --run "
        f"{tmp_path}/runs/mine" in text
    )
    assert (
        f"export PYTHONPATH={tmp_path}/runs/mine/code\nexport PYTHONSAFEPATH=1\n" in text
        and "scontrol requeue" not in text
    )
    assert (tmp_path / "runs/mine/code/memshard/launch/slurm.py").exists()
    assert main(["config", "show", "runs/mine/recipe.yaml"]) == 0
    shown = capfd.readouterr().out
    assert "\n  layers: 3\n" in shown and "\n  steps: 7\n" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["slurm", "quickstart", "train.stesp=3"], "did you mean"),
        (["slurm", "quickstart", "--array", "2", "--chain", "2"], "give --array N or --chain N"),
        (
            ["deepspeed", "quickstart", "--hostfile", "missing"],
            "missing is no hostfile: it must hold lines such as `n1 slots=8`",
        ),
        (["local", "quickstart", "--ranks", "0"], "--ranks is 0"),
        (["slurm", "quickstart", "--cluster", "missing.yaml"], "missing.yaml: No such file"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *argv, "--dry-run"]) == 2
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("n1 slots=2\n")
    assert main(["launch", "slurm", "quickstart", "--dry-run"]) == 0
    assert main(["launch", "local", "quickstart", "--ranks", "2", "--dry-run"]) == 0
    assert (
        main(
            [
                "launch",
                "deepspeed",
                "quickstart",
                "--hostfile",
                "hosts",
                "--ssh-port",
                "2222",
                "--dry-run",
            ]
        )
        == 0
    )
    out = capfd.readouterr().out
    assert (
        "--standalone --nproc-per-node=2" in out
        and "\nTORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in out
    )
    assert f"--hostfile={tmp_path}/hosts --ssh_port=2222 --module memshard train quickstart" in out
    assert "\nDS_ACCELERATOR=cpu\n" in out
    assert {path.name for path in tmp_path.iterdir()} == {"hosts"}


if __name__ == "__main__":
    for name, job in READY_MADE.items():
        (EXAMPLES / name).write_text(render(job))
        (EXAMPLES / name).chmod(0o755)
