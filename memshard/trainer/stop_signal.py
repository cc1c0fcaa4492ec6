"""Signals that ask a run to stop. Imports nothing heavy, so that a signal that arrives during the
long imports is heard.
"""

import signal
from types import FrameType
from typing import Any

PREEMPTED = signal.SIGUSR2
"""Batch systems are asked to send it before they end a job; NCCL is said to use USR1."""


STOPS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, PREEMPTED})
"""SIGHUP comes when a terminal or an ssh session is closed."""


class StopSignal:
    """Set by one of STOPS; a second Ctrl-C aborts. A context manager for the loop."""

    def __init__(self) -> None:
        self.received = False
        self.ignore_on_exit = False
        """Whether SIGTERM and SIGHUP are ignored once the context ends: a launcher that sees one
        rank leave sends it to the others, which must still save, say why, and exit with their code.
        """
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def listen(self, *numbers: signal.Signals) -> None:
        """Handle these signals from now on until the context ends."""
        for number in numbers:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup, to outlive the terminal
            before = signal.signal(number, self._receive)
            self._previous.setdefault(number, before)

    def __enter__(self) -> "StopSignal":
        self.listen(*STOPS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(
                number,
                signal.SIG_IGN
                if self.ignore_on_exit and number in (signal.SIGTERM, signal.SIGHUP)
                else handler,
            )
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Batch systems and launchers may both send a SIGTERM, and launchers pass a Ctrl-C on, so
        # only a second SIGINT aborts.
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.received = True
