"""Run a launcher until the training ends: torchrun on this machine, DeepSpeed's over hosts."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from memshard.launch.cli.outcome import Stopped
from memshard.launch.launchers.start import Start, shell
from memshard.launch.orphans import LAUNCHER, end_child_with_parent, outliving_launcher
from memshard.trainer.stop_signal import STOPS


def lines(values: Mapping[str, str]) -> str:
    """Return an environment as `NAME=value` lines."""
    return "".join(f"{name}={value}\n" for name, value in values.items())


def show(args: argparse.Namespace, command: list[str], environment: str) -> dict[str, Any]:
    """Print the command and its environment's lines; return them as a result."""
    if not args.json:
        print(shell(command))
        if environment:
            print(f"\n# environment of the ranks\n{environment}", end="")
    return {"command": command, "environment": environment.splitlines()}


def run(command: list[str], environment: str, start: Start) -> dict[str, Any]:
    """Run a launcher with these lines added to the environment, passing signals on, and return the
    command's result. Stopped if the run can be resumed, RuntimeError if it failed.

    The launcher's exit code does not tell the two apart; rank 0's heartbeat does.
    """
    from memshard.trainer.watch.heartbeat import read_beats

    before = read_beats(Path(start.folder))
    with outliving_launcher():
        code = _wait(command, environment)
    # Not of an earlier start, if this one failed before its ranks had begun.
    beats = [beat for beat in read_beats(Path(start.folder)) if beat not in before]
    if code and beats and beats[0].rank == 0 and beats[0].ended == "stopped":
        raise Stopped(
            f"at step {beats[0].step}, saved; the same command goes on", {"step": beats[0].step}
        )
    if code:
        raise RuntimeError(
            f"the launcher ended with exit code {code}; see above, and memshard doctor "
            f"{start.folder}"
        )
    return {"run": start.folder}


def _wait(command: list[str], environment: str) -> int:
    """Run the command and return its exit code. Signals that stop a run are passed on to it; Ctrl-C
    reaches it without us, as part of the terminal's process group.
    """
    print(f"memshard: {shell(command)}", file=sys.stderr, flush=True)
    # At the first "=" only: values may hold more of them.
    process = subprocess.Popen(
        command,
        env=os.environ
        | dict(line.split("=", 1) for line in environment.splitlines())
        | {LAUNCHER: str(os.getpid())},
        preexec_fn=end_child_with_parent,
    )

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in STOPS - {signal.SIGINT}}
    # The launcher got Ctrl-C from the terminal and ends the run in order; dying first would leave
    # it without anyone who waits.
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
