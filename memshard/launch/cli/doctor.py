"""`memshard doctor`: what is wrong with the installation, or with a run."""

import argparse
from pathlib import Path
from typing import Any

from memshard.launch.cli.outcome import Failed, usage_errors
from memshard.launch.cli.parser import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation; or who is late, what is stale, which checkpoint is good",
    )
    parser.add_argument(
        "folder", nargs="?", metavar="RUN_DIR", help="a run's folder (default: the installation)"
    )
    parser.add_argument(
        "--deep", action="store_true", help="read every checkpoint against its hashes"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the findings, bad ones marked. Failed if there are any of these."""
    with usage_errors():
        from memshard.launch.doctor import check_installation, check_run

        # A list, so that a mistake in the folder's name is met here, and not while
        # findings are printed.
        findings = list(
            check_run(Path(args.folder), args.deep) if args.folder else check_installation()
        )
    if not args.json:
        for finding in findings:
            print(f"{'!!' if finding.bad else 'ok'}  {finding.text}")
    bad = [finding.text for finding in findings if finding.bad]
    result = {
        "well": not bad,
        "bad": bad,
        "notes": [finding.text for finding in findings if not finding.bad],
    }
    if bad:
        raise Failed(f"{len(bad)} of {len(findings)} findings ask for something to be done", result)
    return result
