"""DeepSpeed's launcher, over ssh or MPI, on the hosts of a hostfile."""

import argparse
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memshard.launch.cli.outcome import usage_errors
from memshard.launch.launchers import foreground
from memshard.launch.launchers.cluster import Cluster, add_cluster_options, cluster_of
from memshard.launch.launchers.start import DEEPSPEED_ENV, Start, installed, snapshot
from memshard.launch.ranks import Ranks, from_variables

_OWN_OPTIONS = {
    "launcher": "DeepSpeed's own: pdsh (default), openmpi, mvapich, ...",
    "include": "DeepSpeed's own: such as n1@n2:0,1",
    "exclude": "DeepSpeed's own: hosts and slots to leave out, as --include",
    "master_addr": "DeepSpeed's own: address of the first host, for the others",
    "master_port": "DeepSpeed's own: port there",
    "ssh_port": "DeepSpeed's own: port of ssh on the hosts",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `memshard launch deepspeed`."""
    parser.add_argument(
        "--hostfile", required=True, metavar="FILE", help="lines such as: n1 slots=8"
    )
    for name, text in _OWN_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="TEXT", help=text)
    add_cluster_options(parser, ("gpus", "cpus", "interface"))


def launch(args: argparse.Namespace) -> dict[str, Any]:
    """Train on the hosts of a hostfile."""
    with usage_errors():
        hosts = Path(args.hostfile)
        _check_hosts(hosts)
        cluster = cluster_of(args)
        start = installed(args) if args.dry_run else snapshot(args)
    command = [
        # As a module of this interpreter: a `deepspeed` on the PATH may belong to another one.
        *(sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hosts.resolve()}"),
        *(f"--{name}={value}" for name in _OWN_OPTIONS if (value := getattr(args, name))),
        *("--module", *start.train),
    ]
    environment = _environment(start, cluster)
    with usage_errors():
        _check_words({"the working directory": os.getcwd()}, r"[\w@+=:,./-]*")
        _check_words(
            {"the run's folder": start.folder, "the recipe": start.recipe}
            | dict(line.split("=", 1) for line in environment.splitlines())
        )
    if args.dry_run:
        return foreground.show(args, command, environment)
    # DeepSpeed's launcher passes the variables of this file on to the remote hosts.
    file = Path(start.folder).resolve() / DEEPSPEED_ENV
    file.write_text(environment, encoding="utf-8")
    return foreground.run(command, environment + f"DS_ENV_FILE={file}\n", start)


def detect(env: Mapping[str, str]) -> Ranks | None:
    """Return this process's place if DeepSpeed's launcher started it."""
    # RANK and WORLD_SIZE are torchrun's too; this one is DeepSpeed's alone.
    return from_variables(env, "DeepSpeed", parent_waits=True) if "CROSS_RANK" in env else None


def _check_hosts(file: Path) -> None:
    """Raise ValueError for what is no hostfile, or holds a name that ssh, which gets it from
    DeepSpeed's launcher as it is, would take for an option: one runs a command.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = [line.strip() for line in text.splitlines()]
    hosts = [line for line in lines if line and not line.startswith("#")]
    # Of hosts in other words DeepSpeed's launcher says itself what is wrong.
    if not any(re.search(r"^\S+\s+slots=\d+", line) for line in hosts):
        raise ValueError(f"{file} is no hostfile: it must hold lines such as `n1 slots=8`")
    for line in hosts:
        if not re.match(r"[\w:][\w.@:-]*\s", line):
            raise ValueError(
                f"{file} holds the line {line!r}, whose first word is no host's name: write "
                "`n1 slots=8`, with a name of letters, digits and .-_@: alone"
            )


def _check_words(words: Mapping[str, str], plain: str = r"[\w@+=:,./ -]*") -> None:
    """Raise ValueError if a word would not reach the other hosts as it is. DeepSpeed joins them to
    one line for their shells, with double quotes around a word with spaces and none around the
    working directory; pdsh replaces %n and %h in it.
    """
    for name, word in words.items():
        if not re.fullmatch(plain, word):
            raise ValueError(
                f"{name} is {word!r}: DeepSpeed's launcher passes it through the other hosts' "
                "shells, which would read it as something else; give it a name of letters, digits "
                "and _@+=:,./- alone, or use `memshard launch slurm`"
            )


def _environment(start: Start, cluster: Cluster) -> str:
    """Return what remote ranks get, as lines of a `.deepspeed_env` file: an ssh session has neither
    this shell's PATH nor its variables.
    """
    values = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": str(cluster.cpus or 1),
    }
    if start.code:
        # An absolute path: where a shell on another host begins is not known. PYTHONSAFEPATH keeps
        # a checkout that it begins in from coming before the copy.
        values |= {"PYTHONPATH": str(Path(start.code).resolve()), "PYTHONSAFEPATH": "1"}
    if not cluster.gpus:
        # Otherwise it looks for an accelerator, and on hosts with GPUs takes them.
        values["DS_ACCELERATOR"] = "cpu"
    return foreground.lines(values | cluster.variables)
