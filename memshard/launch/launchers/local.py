"""torchrun on this machine."""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from memshard.launch.cli.outcome import usage_errors
from memshard.launch.cli.parser import whole
from memshard.launch.launchers import foreground
from memshard.launch.launchers.start import RENDEZVOUS, installed, torchrun_options
from memshard.launch.orphans import SAVE_SECONDS
from memshard.launch.ranks import Ranks, from_variables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `memshard launch local`."""
    parser.add_argument(
        "--ranks", type=whole(), metavar="N", help="processes (default: one a GPU, or one)"
    )
    parser.add_argument(
        "--restarts",
        type=whole(0),
        default=0,
        metavar="N",
        help="how often to start again after a failure (default 0)",
    )


def launch(args: argparse.Namespace) -> dict[str, Any]:
    """Train on this machine."""
    with usage_errors():
        ranks = args.ranks
        if ranks is None:
            # Only to count GPUs: with --ranks the command starts without waiting for torch.
            import torch

            ranks = max(1, torch.cuda.device_count())
        # No snapshot of the code, as for jobs that wait: this starts at once.
        start = installed(args)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={ranks}", f"--max-restarts={args.restarts}"),
        *torchrun_options(SAVE_SECONDS),
        # "--" ends torchrun's options: it would read the command's own as its own.
        *("-m", "--", *start.train),
    ]
    environment = foreground.lines(
        {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **RENDEZVOUS}
    )
    if args.dry_run:
        return foreground.show(args, command, environment)
    return foreground.run(command, environment, start)


def detect(env: Mapping[str, str]) -> Ranks | None:
    """Return this process's place if torchrun started it, on one machine or many."""
    return (
        from_variables(env, "torchrun", parent_waits=True) if "TORCHELASTIC_RUN_ID" in env else None
    )
