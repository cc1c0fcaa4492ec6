"""The argument parser of all commands."""

import argparse
from typing import Any, NoReturn, TypeAlias

from memshard.data_pipeline.fetch import ALLOWED
from memshard.launch.cli.outcome import UsageError

Subparsers: TypeAlias = "argparse._SubParsersAction[CommandParser]"


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Add --allow, without which nothing that a file says runs a command or connects anywhere."""
    parser.add_argument(
        "--allow",
        choices=ALLOWED,
        help="what files may ask for, and not only the command line: connections (URLs, "
        "train.wandb), or commands (pipe:) as well (default: neither)",
    )


class CommandParser(argparse.ArgumentParser):
    """Takes the global flags before and after the command, and raises UsageError instead of
    exiting.

    A command whose last positional is `overrides` (nargs="*") also takes `key=value` after its
    options.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        # SUPPRESS: a command's parser must not reset what was given before the command.
        self.add_argument(
            "--json",
            action="store_true",
            default=argparse.SUPPRESS,
            help="print the result as one JSON object",
        )
        self.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of an error",
        )

        # DeepSpeed and old launchers pass it on; the environment says the same.
        self.add_argument(
            "--local_rank",
            "--local-rank",
            type=int,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_command(self, argv: list[str]) -> argparse.Namespace:
        args, rest = self.parse_known_args(argv, argparse.Namespace(json=False, debug=False))
        # argparse takes all `overrides` in one place; those behind an option come back as unknown.
        if rest and not (
            hasattr(args, "overrides")
            and all("=" in text and not text.startswith("-") for text in rest)
        ):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            args.overrides = [*args.overrides, *rest]
        return args
