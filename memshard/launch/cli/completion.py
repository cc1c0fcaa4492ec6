"""`memshard completion`: words after TAB in a shell."""

import argparse
from typing import Any

from memshard.launch.cli.parser import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "completion", help="print what completes commands and options after TAB in a shell"
    )
    parser.add_argument(
        "shell",
        choices=("bash", "zsh", "tcsh"),
        help='for bash: eval "$(memshard completion bash)" in ~/.bashrc',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the script of a shell."""
    import shtab

    # Here, since the parser of all commands has this one.
    from memshard.launch.cli.main import command_parser

    script = shtab.complete(command_parser(), shell=args.shell)
    print(script)
    return {"script": script}
