"""`memshard reproduce`: run a paper's experiment again."""

import argparse
import os
from pathlib import Path
from typing import Any

from memshard.experiments.common import catalogue
from memshard.io import check_free, read_json_lines
from memshard.launch.cli.outcome import UsageError, describe, usage_errors
from memshard.launch.cli.parser import whole
from memshard.lock import FolderHeld


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `reproduce` command."""
    parser = subparsers.add_parser("reproduce", help="run a paper's experiment: table, plot, JSON")
    parser.add_argument("name", nargs="?", metavar="NAME", help="experiment; --list shows them")
    parser.add_argument(
        "--list", action="store_true", help="what can be reproduced, and what it costs"
    )
    parser.add_argument(
        "--scale",
        choices=catalogue.SCALES,
        default="small",
        help="smoke (minutes), small (default; hours), full (as published)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder of results (default runs/reproduce/NAME)"
    )
    parser.add_argument(
        "--workers",
        type=whole(),
        help="points run side by side, one thread each (default: the machine's cores)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """List the experiments, or run what is missing of one and write its report."""
    if args.list:
        experiments = {name: catalogue.find(name) for name in catalogue.names()}
        if not args.json:
            for name, experiment in experiments.items():
                hours = ", ".join(
                    f"{scale} {experiment.hours[scale]:g}" for scale in catalogue.SCALES
                )
                print(f"{name}\n    {experiment.what}\n    hours of one core: {hours}")
        return {
            name: {"what": experiment.what, "hours": experiment.hours}
            for name, experiment in experiments.items()
        }
    if args.name is None:
        raise UsageError("name an experiment (memshard reproduce --list shows them)")
    # After the checks: it loads torch, and --list and mistakes need no torch.
    from memshard.experiments.common.run import REPORT_FILE, RESULTS_FILE, SUMMARY_FILE, reproduce

    folder = Path(args.out or f"runs/reproduce/{args.name}")
    with usage_errors():
        catalogue.find(args.name)
        if not read_json_lines(folder / RESULTS_FILE):
            check_free(folder, (SUMMARY_FILE, REPORT_FILE), "choose another folder with --out")
    try:
        return reproduce(args.name, args.scale, folder, args.workers or os.cpu_count() or 1)
    # Points look for their data; the message has the command that builds them.
    except (FileNotFoundError, FolderHeld) as error:
        raise UsageError(describe(error)) from error
