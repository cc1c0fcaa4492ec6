"""The `memshard` command: parses, runs one command, and turns its end into output and exit code.

Exit codes: 0 done, 2 bad usage or recipe, 75 stopped early but resumable, 141 nobody read the
output to its end, 1 anything else. With
--json, standard output holds exactly one JSON object, written by rank 0; whatever else is printed
goes to standard error.
"""

import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

import memshard
from memshard.launch.cli import (
    bench,
    completion,
    config,
    data,
    doctor,
    export,
    generate,
    import_,
    launch,
    plan,
    reproduce,
    search,
    train,
)
from memshard.launch.cli import eval as evaluate
from memshard.launch.cli.outcome import (
    Failed,
    Stopped,
    UsageError,
    describe,
    printable,
    rank,
)
from memshard.launch.cli.parser import CommandParser
from memshard.launch.cli.streams import (
    CLOSED_PIPE,
    forget_errors,
    nobody_reads,
    prepare_streams,
)
from memshard.redact import without_secrets

# Modules that import what they run only when they run it, so that this tuple loads no model.
COMMANDS = (
    train,
    evaluate,
    generate,
    export,
    import_,
    plan,
    launch,
    data,
    doctor,
    reproduce,
    search,
    bench,
    config,
    completion,
)


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return the exit code."""
    prepare_streams()
    try:
        return _report(sys.argv[1:] if argv is None else argv)
    finally:
        forget_errors()


def _report(argv: list[str]) -> int:
    # Looked up before parsing: a wrong command line has to end in a JSON object as well.
    if "--json" not in argv:
        return _run(argv)[0]
    code = 1
    try:
        with _stdout_to_stderr() as out:
            code, result = _run(argv)
            if rank() == 0:
                print(json.dumps(_plain(result), allow_nan=False), file=out)
    except BrokenPipeError:
        return code or CLOSED_PIPE
    return code


def _run(argv: list[str]) -> tuple[int, dict[str, Any]]:
    try:
        args = command_parser().parse_command(argv)
        with _as_ctrl_c():
            result = args.run(args) or {}
        # Here, so that a full disk or a closed pipe is an error of this command, and not a message
        # at the interpreter's end.
        sys.stdout.flush()
        return 0, result
    except (BrokenPipeError, UsageError) as error:
        if nobody_reads(error):
            return CLOSED_PIPE, {}
        return _error(argv, error)
    except Stopped as stop:
        return _fail(argv, 75, "stopped", str(stop), stop.result)
    # 75 as well: a run that is interrupted goes on from its last checkpoint.
    except KeyboardInterrupt:
        return _fail(argv, 75, "stopped", "interrupted; run the same command again to resume", {})
    except Failed as failure:
        return _fail(argv, 1, "error", str(failure), failure.result)
    except Exception as error:
        return _error(argv, error)


def _error(argv: list[str], error: Exception) -> tuple[int, dict[str, Any]]:
    if isinstance(error, UsageError):
        return _fail(argv, 2, "error", describe(error), {})
    message = f"{type(error).__name__}: {describe(error)}"
    if "--debug" not in argv:
        message += " (run again with --debug for the traceback)"
    return _fail(argv, 1, "error", message, {})


def _fail(
    argv: list[str], code: int, kind: str, message: str, result: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Say why, and return what JSON says. The user's mistakes and stops are the same on all
    ranks, so only rank 0 speaks of them.
    """
    message = without_secrets(message)
    with suppress(OSError):  # without a terminal the exit code must still be right
        if "--debug" in argv:
            traceback.print_exc()
        if rank() == 0:
            print(f"memshard: {kind}: {printable(message)}", file=sys.stderr)
        # Any other error may be of one rank alone, so each speaks.
        elif code == 1:
            print(f"memshard: {kind}: rank {rank()}: {printable(message)}", file=sys.stderr)
    return code, {**result, kind: message}


def command_parser() -> CommandParser:
    """Return the parser of all commands."""
    parser = CommandParser(
        prog="memshard", description="Train language models with product-key memory layers."
    )
    parser.add_argument("--version", action="version", version=f"memshard {memshard.__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


@contextmanager
def _as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: half-written folders are removed, locks
    released, and the exit code says that it can go on. A training run saves first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # which alone hears signals
        return
    ours = signal.default_int_handler
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, ours)
    try:
        yield
    finally:
        for number in numbers:
            # Ranks ignore them once their run has ended.
            if signal.getsignal(number) is ours:
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def _stdout_to_stderr() -> Iterator[TextIO]:
    """Yield the real standard output; everything else, child processes and C libraries included,
    reaches standard error.
    """
    sys.stdout.flush()
    # By file descriptor: redirecting sys.stdout alone would miss C libraries and child processes.
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        # A second copy: closing `out` closes its descriptor, and `real` is still needed to restore.
        with os.fdopen(os.dup(real), "w", encoding="utf-8") as out, redirect_stdout(sys.stderr):
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def _plain(value: Any) -> Any:
    """Return a result as strict JSON readers accept it: infinities and NaN become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
