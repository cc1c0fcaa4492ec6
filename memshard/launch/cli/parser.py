"""The argument parser of all commands."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from memshard.data_pipeline.fetch import ALLOWED
from memshard.launch.cli.outcome import UsageError

Subparsers: TypeAlias = "argparse._SubParsersAction[CommandParser]"


MOST_SEED = (1 << 63) - 1
"""Random draws take seeds as int64."""


def whole(least: int = 1, most: int = (1 << 63) - 1) -> Callable[[str], int]:
    """Return an argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            limit = f"at most {most:,}" if value > most else f"at least {least}"
            raise argparse.ArgumentTypeError(f"is {value}; it must be {limit}")
        return value

    parse.__name__ = "whole number"  # argparse: invalid whole number value: 'x'
    return parse


def real(least: float) -> Callable[[str], float]:
    """Return an argparse type: a finite number of at least `least`."""

    def parse(text: str) -> float:
        value = float(text)
        if not (least <= value and math.isfinite(value)):
            raise argparse.ArgumentTypeError(
                f"is {value:g}; it must be a finite number of at least {least:g}"
            )
        return value

    parse.__name__ = "number"
    return parse


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
        # "--batch is 0; ...", and not "argument --batch: is 0; ..."
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)
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
