"""Scripts as they are rendered: the one in memshard/launch/examples is the golden file."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

import memshard
from memshard.launch.cli.main import main
from memshard.launch.launchers.cluster import Cluster, load_cluster
from memshard.launch.launchers.slurm import Flavour, Job, render
from memshard.launch.launchers.start import Start

EXAMPLE = Path(memshard.__file__).parent / "launch/examples/32-gpus.sh"
START = Start("lample2019", (), "runs/lample2019")
V100 = Cluster(
    nodes=4,
    gpus=8,
    cpus=5,
    venv=".venv",
    partition="gpu",
    account="my-account",
    constraint="v100-32g",
    interface="ib0",
)


def test_the_example_is_what_is_rendered() -> None:
    """`python -m tests.launch.test_scripts` writes it anew."""
    assert EXAMPLE.read_text() == render(Job(start=START, cluster=V100))


@pytest.mark.parametrize("flavour", get_args(Flavour))
def test_every_flavour_starts_32_ranks(flavour: Flavour) -> None:
    script = render(Job(start=START, cluster=V100, flavour=flavour))
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    train = "memshard train lample2019 --run runs/lample2019"
    start = {
        "srun": (
            "#SBATCH --ntasks-per-node=8\n",
            f"--cpus-per-task=$SLURM_CPUS_PER_TASK python -m {train} &",
        ),
        "torchrun": (
            "#SBATCH --ntasks-per-node=1\n",
            "python -m torch.distributed.run --nnodes=$SLURM_NNODES --nproc-per-node=8 \\\n",
            '--rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --max-restarts=3 \\\n',
            f"    -m -- {train} &",
        ),
        "deepspeed": (
            "#SBATCH --ntasks-per-node=1\n",
            'sed "s/\\$/ slots=8/" > runs/lample2019/hostfile\n',
            'bash -c \'trap "" USR2; exec python -m deepspeed.launcher.runner ',
            f"--module {train}' &",
        ),
    }
    assert not [line for line in start[flavour] if line not in script], script


def test_turns_do_not_requeue_themselves() -> None:
    cluster = Cluster(
        container="apptainer exec image.sif",
        setup=("module load cuda",),
        env={"NCCL_DEBUG": "WARN x"},
    )
    script = render(Job(start=START, cluster=cluster, turns=5, workdir="/home/a b"))
    for line in (
        "#SBATCH --array=1-5%1",
        '#SBATCH --chdir="/home/a b"',
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
    path.write_text("partition: gpu\ngpus: 4\ntime: 2:00:00\nsetup: [module load a]\nenv: {A: 1}\n")
    cluster = load_cluster(path, {"gpus": 8, "nodes": None})
    assert cluster == Cluster(
        partition="gpu", gpus=8, time="2:00:00", setup=("module load a",), env={"A": "1"}
    )
    assert cluster.ranks_per_node == 8
    for text, message in (
        ("partion: a\n", "unknown key 'partion'; did you mean 'partition'?"),
        ("time: 2\n", "time is 2; expected str"),
        ("a: &a [1]\n" + "a: [*a]\n", "'a' is given twice in one section"),
        (f"env: {{A: &a [{'x, ' * 400}], B: [{'*a, ' * 400}]}}\n", "more than 100,000 values"),
        ("gpus: many\n", "gpus is 'many'; expected int"),
        ("- a\n", "expected `key: value` lines"),
        ("nodes: 0\n", "nodes is 0; it must be at least 1"),
        ("env: {A-B: 1}\n", "env: 'A-B' is not a name that a shell can export"),
        ("env: {'A;touch x;B': 1}\n", "env: 'A;touch x;B' is not a name that a shell can export"),
        ('env: {A: "1\\n2"}\n', "env: A is '1\\\\n2'; it must be one line"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            load_cluster(path, {})


def test_submitting_keeps_code_and_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """sbatch here is a script that prints its arguments' number: SLURM itself is
    met in test_cluster.py.
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
    (code,) = (tmp_path / "runs/mine/code").iterdir()
    assert (
        f"{sys.executable} -m memshard train {tmp_path}/runs/mine/recipe.yaml --run "
        f"{tmp_path}/runs/mine" in text
    )
    assert (
        f"export PYTHONPATH={code}\nexport PYTHONSAFEPATH=1\n" in text
        and "scontrol requeue" not in text
    )
    assert (code / "memshard/launch/launchers/slurm.py").exists()
    # The code that an earlier job runs stays; other code gets a folder of its own.
    code.rename(code.with_name("0123456789abcdef"))
    again = ["launch", "slurm", "quickstart", "model.layers=3", "train.steps=7", "--run"]
    for _ in range(2):
        assert main([*again, "runs/mine"]) == 0
        capfd.readouterr()
        copies = {path.name for path in (tmp_path / "runs/mine/code").iterdir()}
        assert copies == {"0123456789abcdef", code.name}
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


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\\b", "a\tb"])
def test_values_that_no_sbatch_line_holds_are_refused(bad: str) -> None:
    """A line feed would make shell of the rest."""
    for job in (
        Job(start=replace(START, folder=f"runs/{bad}"), cluster=V100),
        Job(start=START, cluster=replace(V100, account=bad)),
        Job(start=START, cluster=replace(V100, constraint=bad)),
        Job(start=START, cluster=V100, workdir=f"/home/{bad}"),
    ):
        with pytest.raises(ValueError, match="an sbatch script cannot hold"):
            render(job)


@pytest.mark.parametrize("name", ["a$(touch x)", "a;b", "a`b`", "50%n", 'a"b', "a&b"])
def test_deepspeed_refuses_words_that_other_hosts_would_read_as_something_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("n1 slots=2\n")
    command = ["launch", "deepspeed", "quickstart", "--hostfile", "hosts", "--dry-run"]
    assert main([*command, "--run", f"runs/{name}"]) == 2
    err = capfd.readouterr().err
    assert f"the run's folder is {f'runs/{name}'!r}" in err and "memshard launch slurm" in err
    Path("cluster.yaml").write_text(f"env: {{A: {json.dumps(name)}}}\n")
    assert main(command) == 2
    assert f"A is {name!r}" in capfd.readouterr().err
    Path("cluster.yaml").unlink()
    Path(name).mkdir()
    Path("hosts").rename(Path(name) / "hosts")
    monkeypatch.chdir(name)
    assert main(command) == 2
    assert "the working directory is" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["-oProxyCommand=id", "n2;id", "$(id)", "n%h", "'n2"])
def test_a_name_in_a_hostfile_that_ssh_or_a_shell_would_run_is_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"# all\n\nuser@n-1.site slots=2\n{name} slots=2\n")
    argv = ["launch", "deepspeed", "quickstart", "--hostfile", str(hosts), "--dry-run"]
    assert main(argv) == 2
    assert f"holds the line {f'{name} slots=2'!r}" in capfd.readouterr().err


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
    EXAMPLE.write_text(render(Job(start=START, cluster=V100)))
