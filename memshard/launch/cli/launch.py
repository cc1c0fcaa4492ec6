"""`memshard launch`: start a recipe through SLURM, DeepSpeed's launcher or torchrun, or print what
would start it.
"""

import argparse
import os
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshard.launch.cli.outcome import Stopped, usage_errors
from memshard.launch.cli.parser import Subparsers

if TYPE_CHECKING:
    from memshard.launch.launchers.cluster import Cluster
    from memshard.launch.launchers.start import Start

_NUMBERS = ("nodes", "gpus", "ranks", "cpus", "notice")
_OPTIONS = (
    *_NUMBERS,
    "time",
    "partition",
    "account",
    "qos",
    "constraint",
    "venv",
    "container",
    "interface",
)


def add_parser(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "launch", help="start on this machine, on hosts over ssh, or through SLURM"
    )
    how = parser.add_subparsers(dest="how", metavar="HOW", required=True, parser_class=type(parser))

    local = how.add_parser("local", help="torchrun on this machine")
    _common(local)
    local.add_argument(
        "--ranks", type=int, metavar="N", help="processes (default: one a GPU, or one)"
    )
    local.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="how often to start again after a failure (default 0)",
    )
    local.set_defaults(run=run_local)

    deepspeed = how.add_parser(
        "deepspeed", help="DeepSpeed's launcher over the hosts of a hostfile"
    )
    _common(deepspeed)
    deepspeed.add_argument(
        "--hostfile", required=True, metavar="FILE", help="lines such as: n1 slots=8"
    )
    for option, text in (
        ("launcher", "pdsh (default), openmpi, mvapich, ..."),
        ("include", "such as n1@n2:0,1"),
        ("exclude", ""),
    ):
        deepspeed.add_argument(
            f"--{option}", metavar="TEXT", help=f"DeepSpeed's own: {text}".rstrip(": ")
        )
    for option in ("master_addr", "master_port", "ssh_port"):
        deepspeed.add_argument(
            f"--{option.replace('_', '-')}", dest=option, metavar="TEXT", help="DeepSpeed's own"
        )
    _cluster(deepspeed, ("gpus", "cpus", "interface"))
    deepspeed.set_defaults(run=run_deepspeed)

    slurm = how.add_parser("slurm", help="an sbatch script, submitted")
    _common(slurm)
    flavours = ["srun", "torchrun", "deepspeed"]
    slurm.add_argument(
        "--flavour",
        choices=flavours,
        default="srun",
        help="who starts a node's ranks (default srun)",
    )
    slurm.add_argument(
        "--array",
        type=int,
        default=1,
        metavar="N",
        help="N turns of the job, one after the other, as an array",
    )
    slurm.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs, each waiting for the one before"
    )
    slurm.add_argument("--after", metavar="JOB", help="wait until this job has ended")
    _cluster(slurm, _OPTIONS)
    slurm.set_defaults(run=run_slurm)


def run_local(args: argparse.Namespace) -> dict[str, Any]:
    """Trains on this machine."""
    from memshard.launch.launchers import foreground

    with usage_errors():
        ranks = args.ranks
        if ranks is None:
            import torch

            ranks = max(1, torch.cuda.device_count())
        if ranks < 1:
            raise ValueError(f"--ranks is {ranks}; it must be at least 1")
        start = _installed(args)
    command, environment = (
        foreground.local_command(start, ranks, args.restarts, notice=180),
        foreground.local_environment(),
    )
    if args.dry_run:
        return _show(args, command, environment)
    return _outcome(foreground.run_here(command, environment), start)


def run_deepspeed(args: argparse.Namespace) -> dict[str, Any]:
    """Trains on the hosts of a hostfile."""
    from memshard.launch.launchers import foreground

    with usage_errors():
        hosts = Path(args.hostfile)
        if not hosts.is_file() or not re.search(
            r"^\s*\S+\s+slots=\d+", hosts.read_text(), re.MULTILINE
        ):
            raise ValueError(f"{hosts} is no hostfile: it must hold lines such as `n1 slots=8`")
        cluster = _load_cluster(args)
        names = ("launcher", "include", "exclude", "master_addr", "master_port", "ssh_port")
        options = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name)]
        start = _installed(args) if args.dry_run else _snapshot(args)
    command = foreground.deepspeed_command(start, str(hosts.resolve()), options)
    environment = foreground.deepspeed_environment(start, cluster)
    if args.dry_run:
        return _show(args, command, environment)
    return _outcome(foreground.run_deepspeed(command, start, environment), start)


def run_slurm(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the script and submits it."""
    from memshard.launch.launchers import slurm

    with usage_errors():
        if min(args.array, args.chain) != 1:
            raise ValueError("give --array N or --chain N, with N of at least 1, not both")
        cluster = _load_cluster(args)
        start = _installed(args) if args.dry_run else _snapshot(args)
        folder = str(Path(start.folder).resolve())
        if not args.dry_run:
            start = replace(
                start,
                recipe=str(Path(start.recipe).resolve()),
                folder=folder,
                code=str(Path(start.code or "").resolve()),
            )
        python = "python" if cluster.venv or cluster.container else sys.executable
        job = slurm.Job(
            start=start,
            cluster=cluster,
            flavour=args.flavour,
            python=python,
            workdir=os.getcwd(),
            turns=args.array,
            requeue=args.chain == 1,
        )
        script = slurm.render(job)
        if args.dry_run:
            if not args.json:
                print(script, end="")
            return {"script": script}
        path = Path(folder) / "submit.sh"
        path.write_text(script)
        jobs: list[str] = []
        for _ in range(args.chain):
            jobs.append(slurm.submit(path, jobs[-1] if jobs else args.after))
    logs = f"{folder}/log/slurm-*.out, rank*.log"
    if not args.json:
        print(
            f"job {', '.join(jobs)}: {path}\nlogs: {logs}\nwho is late, what is stale: memshard "
            f"doctor {folder}"
        )
    return {"jobs": jobs, "script": str(path), "logs": logs, "run": folder}


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a YAML file, the name of a bundled recipe, or a run folder",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the recipe's"
    )
    parser.add_argument(
        "--run", dest="folder", metavar="DIR", help="the run's folder (default runs/RECIPE)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command or script, start nothing"
    )


def _cluster(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    parser.add_argument(
        "--cluster",
        metavar="FILE",
        help="facts about the cluster (default cluster.yaml, where there is one)",
    )
    for name in names:
        kind, metavar = (int, "N") if name in _NUMBERS else (str, "TEXT")
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help="as in the file")


def _load_cluster(args: argparse.Namespace) -> "Cluster":
    from memshard.launch.launchers.cluster import Cluster, load_cluster

    options = {item.name: getattr(args, item.name, None) for item in fields(Cluster)}
    return load_cluster(Path(args.cluster) if args.cluster else None, options)


def _installed(args: argparse.Namespace) -> "Start":
    """The start of what is installed, after a look at the recipe."""
    from memshard.launch.cli.train import run_folder
    from memshard.launch.launchers.start import Start
    from memshard.trainer.config.load import load_recipe

    load_recipe(args.recipe, args.overrides)
    return Start(args.recipe, tuple(args.overrides), str(run_folder(args)))


def _snapshot(args: argparse.Namespace) -> "Start":
    from memshard.launch.cli.train import run_folder
    from memshard.launch.launchers.start import snapshot

    return snapshot(args.recipe, args.overrides, run_folder(args))


def _show(args: argparse.Namespace, command: list[str], environment: str = "") -> dict[str, Any]:
    from memshard.launch.launchers.start import shell

    if not args.json:
        print(shell(command))
        if environment:
            print(f"\n# environment of the ranks\n{environment}", end="")
    return {"command": command, "environment": environment.splitlines()}


def _outcome(code: int, start: "Start") -> dict[str, Any]:
    """What a launcher's end means: its own exit code does not tell a stop from a failure, rank 0's
    heartbeat does.
    """
    from memshard.trainer.watch.heartbeat import read_beats

    beats = read_beats(Path(start.folder))
    if code and beats and beats[0].rank == 0 and beats[0].ended == "stopped":
        raise Stopped(
            f"at step {beats[0].step}, saved; the same command goes on", {"step": beats[0].step}
        )
    if code:
        raise RuntimeError(
            f"the launcher ended with exit code {code}; see above, and memshard doctor "
            f"{start.folder}"
        )
    return {"run": start.folder}
