"""Standard streams that are closed, or lead to a pipe that nobody reads, to a full disk, or to a
terminal.
"""

import io
import logging
import os
import select
import sys

from memshard.redact import spelled

CLOSED_PIPE = 141
"""Exit code where nobody read the output to its end: what a shell reports for SIGPIPE."""


class _Terminal(io.TextIOWrapper):
    """Standard output on a terminal: a name in a file, or a stranger's model, may say control
    sequences, which change its title and the clipboard.
    """

    def write(self, text: str) -> int:
        """Write text with its control characters spelled out."""
        return super().write(spelled(text))


class _Spelled(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return spelled(super().format(record))


def prepare_streams() -> None:
    """Open what is closed of standard input, output and error, and let output be any text, and no
    more than text on a terminal.
    """
    # Else the next file that is opened would get the number of a closed one, and what libraries
    # print would land in it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error does by itself: names of files may hold any bytes, and a locale of
        # ISO-8859-1 knows few letters.
        sys.stdout.reconfigure(errors="backslashreplace")
        if sys.stdout.isatty() and not isinstance(sys.stdout, _Terminal):
            encoding = sys.stdout.encoding
            sys.stdout = _Terminal(
                sys.stdout.detach(), encoding, "backslashreplace", line_buffering=True
            )
    # Prints warnings where no log is set up.
    if logging.lastResort:
        logging.lastResort.setFormatter(_Spelled())


def nobody_reads(error: BaseException) -> bool:
    """Return whether an error came from a standard stream that is a pipe without a reader; it leads
    nowhere from then on.
    """
    if not isinstance(error, BrokenPipeError) and not isinstance(error.__cause__, BrokenPipeError):
        return False
    # The error may be of another pipe, such as one to a worker that died.
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    closed = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in closed:
        lead_nowhere(descriptor)
    return bool(closed)


def lead_nowhere(descriptor: int) -> None:
    """Send what is still written to a standard stream, as at the interpreter's end, to nobody."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def forget_errors() -> None:
    """Let go of what standard error did not take, as on a full disk: at the interpreter's end it
    would make the exit code 120.
    """
    try:
        sys.stderr.flush()
    except OSError:
        lead_nowhere(2)


def show(text: str) -> None:
    """Print to standard output if that is possible: a run is worth more than its output."""
    try:
        print(text, flush=True)
    except OSError:
        lead_nowhere(1)
