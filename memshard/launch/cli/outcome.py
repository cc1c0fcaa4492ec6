"""The ends of a command besides its result: exit code 2 for mistakes, 75 for stopping early."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memshard.launch.ranks import read_ranks


class UsageError(Exception):
    """A mistake in the command line, the recipe or the files they name; the message is one line
    with the fix. Exit code 2.
    """


class Stopped(Exception):
    """The run ended before its last step and can be resumed; `result` is what it has to report so
    far. Exit code 75.
    """

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


class Failed(Exception):
    """The command did its work, and what it looked at is not well; `result` is what it saw. Exit
    code 1.
    """

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError or OSError of a command's set-up into a UsageError, which is the user's to
    mend.

    Later ones, from inside the work, are bugs. A context manager.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(describe(error)) from error


def describe(error: BaseException) -> str:
    """Return the error's message on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Return text as a terminal may have it: names in files may hold its control sequences, and
    bytes that are no UTF-8.
    """
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def rank() -> int:
    """Return this process's number in the run that torchrun, srun or nothing has set up; 0 if that
    cannot be read, which is then what this process has to say.
    """
    try:
        return read_ranks(os.environ).rank
    except ValueError:
        return 0
