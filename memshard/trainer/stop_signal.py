"""Being told to stop. Imports nothing heavy, so that a signal is heard before the long imports are
done.
"""

import signal
from types import FrameType
from typing import Any

PREEMPTED = signal.SIGUSR2
"""What batch systems are asked to send before they end a job; NCCL is said to use USR1."""


class StopSignal:
    """Set by Ctrl-C, SIGTERM or SIGUSR2; a second Ctrl-C aborts at once. Use as a context manager
    around the loop.
    """

    def __init__(self) -> None:
        self.received = False
        self.last_words = False
        """Whether SIGTERM is ignored once the context ends. A launcher that sees one rank leave
        ends the others, while these save, say why, and leave with an exit code of their own.
        """
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def listen(self, *numbers: signal.Signals) -> None:
        """Take these signals from now on, until the context ends. A signal may come twice: from the
        batch system and a launcher.
        """
        for number in numbers:
            before = signal.signal(number, self._receive)
            self._previous.setdefault(number, before)

    def __enter__(self) -> "StopSignal":
        self.listen(signal.SIGINT, signal.SIGTERM, PREEMPTED)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(
                number, signal.SIG_IGN if self.last_words and number == signal.SIGTERM else handler
            )
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Launchers pass a Ctrl-C on and may add a SIGTERM of their own: only SIGINT counts as
        # impatience.
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.received = True
