"""Facts about a cluster, the same for all recipes: cluster.yaml, or options of memshard launch."""

import argparse
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from memshard.io import read_small
from memshard.trainer.config.field_docs import field_docs

FILE = "cluster.yaml"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where and how a job runs."""

    nodes: int = 1
    """nodes of a job"""
    gpus: int = 0
    """GPUs of a node, one rank each; 0 trains on processors"""
    ranks: int | None = None
    """ranks of a node, by default one a GPU, or one"""
    cpus: int | None = None
    """processor cores of a rank"""
    time: str = "24:00:00"
    """time limit of one start, as SLURM writes it"""
    partition: str | None = None
    """SLURM partition"""
    account: str | None = None
    """SLURM account to charge"""
    qos: str | None = None
    """quality of service"""
    constraint: str | None = None
    """features that nodes must have, such as v100-32g"""
    notice: int = 180
    """seconds before the time limit at which the ranks are told to save; longer than a step and a
    save take
    """
    venv: str | None = None
    """virtual environment to activate; by default the interpreter that runs this command"""
    container: str | None = None
    """command that runs another one in a container, such as: apptainer exec --nv image.sif"""
    interface: str | None = None
    """network interface for NCCL and gloo, such as ib0"""
    setup: tuple[str, ...] = ()
    """shell lines before the start, such as: module load cuda"""
    env: Mapping[str, str] = field(default_factory=dict)
    """environment variables"""

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks", "cpus", "notice"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.gpus < 0:
            raise ValueError(f"gpus is {self.gpus}; it must be at least 0")
        for name, value in self.env.items():
            # Scripts export these names as they are, and a file for other hosts has one a line.
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"env: {name!r} is not a name that a shell can export")
            if not value.isprintable():
                raise ValueError(f"env: {name} is {value!r}; it must be one line of plain text")

    @property
    def ranks_per_node(self) -> int:
        """Number of processes on a node."""
        return self.ranks or self.gpus or 1

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the ranks that follow from `interface` and `env`."""
        interface = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if self.interface else ()
        return {name: str(self.interface) for name in interface} | dict(self.env)


def add_cluster_options(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    """Add --cluster, and an option for each of these facts."""
    parser.add_argument(
        "--cluster",
        metavar="FILE",
        help="facts about the cluster (default cluster.yaml, where there is one)",
    )
    types, docs = get_type_hints(Cluster), field_docs(Cluster)
    for name in names:
        kind, metavar = (int, "N") if _kind(types[name]) is int else (str, "TEXT")
        # argparse formats help with %.
        text = docs[name].replace("%", "%%")
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)


def cluster_of(args: argparse.Namespace) -> Cluster:
    """Return the cluster that a command line describes. ValueError or OSError for mistakes."""
    options = {item.name: getattr(args, item.name, None) for item in fields(Cluster)}
    return load_cluster(Path(args.cluster) if args.cluster else None, options)


def load_cluster(path: Path | None, options: Mapping[str, Any]) -> Cluster:
    """Return the cluster of a file (by default ./cluster.yaml, if there is one); options that are
    not None win. ValueError for wrong keys.
    """
    values: dict[str, Any] = {}
    if path is None and Path(FILE).exists():
        path = Path(FILE)
    if path is not None:
        from memshard.trainer.config.text import MOST_BYTES, parse

        # With its limits: of aliases of aliases, the text alone would fill memory.
        values = parse(read_small(path, MOST_BYTES).decode(), str(path)) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected `key: value` lines, such as partition: gpu")
    types = {name: _kind(hint) for name, hint in get_type_hints(Cluster).items()}
    for key, value in values.items():
        if key not in types:
            close = difflib.get_close_matches(str(key), types, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(types)}"
            raise ValueError(f"{path}: unknown key '{key}'; {hint}")
        # true is an int to Python.
        if not isinstance(value, types[key]) or isinstance(value, bool):
            raise ValueError(f"{path}: {key} is {value!r}; expected {types[key].__name__}")
    # After the checks, which are for what YAML makes of a file; argparse has checked options.
    values |= {key: value for key, value in options.items() if value is not None}
    if "env" in values:
        # YAML reads 1 and true as what they are; an environment has text only.
        values["env"] = {str(key): str(value) for key, value in values["env"].items()}
    if "setup" in values:
        values["setup"] = tuple(values["setup"])
    return Cluster(**values)


def _kind(hint: Any) -> type:
    """Return the type that YAML has for a field."""
    if get_origin(hint) in (tuple, Mapping):
        return list if get_origin(hint) is tuple else dict
    return int if hint in (int, int | None) else str
