"""The launchers of `memshard launch`, one row each.

Adding one takes a file in this folder and a row here. The file has three functions:

    add_arguments(parser)   the options of `memshard launch NAME`, besides those that all have
    launch(args) -> dict    start the run, or with args.dry_run print what would; returns the
                            command's result
    detect(env) -> Ranks    this process's place among those that it started, or None if the
                            environment is not one that it sets

It loads neither torch nor pydantic at its top, since every command asks for its rank.
"""

from typing import NamedTuple


class Launcher(NamedTuple):
    """help: one line for `memshard launch --help`. module: the file with the three functions."""

    help: str
    module: str


LAUNCHERS = {
    "local": Launcher("torchrun on this machine", "memshard.launch.launchers.local"),
    "deepspeed": Launcher(
        "DeepSpeed's launcher over the hosts of a hostfile", "memshard.launch.launchers.deepspeed"
    ),
    "slurm": Launcher("an sbatch script, submitted", "memshard.launch.launchers.slurm"),
}
"""By name. `read_ranks` asks in this order: torchrun and DeepSpeed also run inside SLURM steps."""
