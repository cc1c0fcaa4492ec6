"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal."""

import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from memshard.io import atomic_write, parse_json, read_small
from memshard.trainer.config.recipe import Recipe
from memshard.trainer.run_folder import METRICS_FILE, MOST_METRICS
from memshard.trainer.watch import weights_and_biases
from memshard.trainer.watch.line_file import LineFile

log = logging.getLogger(__name__)


class Metrics:
    """Writes the numbers of a run into its folder, from the step `first` on: lines of later steps
    that an earlier start left are dropped.

    enabled: false on all ranks but one, where every method does nothing. owned: returns whether the
    folder is still this run's.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        first: int,
        enabled: bool,
        owned: Callable[[], bool] = lambda: True,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        train = recipe.train
        path = folder / METRICS_FILE
        lines = read_metrics(path) if path.exists() else []
        kept = [line for line in lines if line["step"] <= first]
        if lines and not first:
            log.warning(
                "%s went to step %d, but there is no checkpoint: the run begins anew",
                path,
                lines[-1]["step"],
            )
        # Neither a kill nor a power cut may cost the lines that are kept.
        with atomic_write(path, durable=True) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = LineFile(path, owned)
        self._folder = folder
        self._board: SummaryWriter | None = None
        self._board_failing = False
        # Hides what an earlier start wrote after its step.
        self._purge: int | None = first + 1
        self._wandb = weights_and_biases.begin(folder, recipe, kept) if train.wandb else None
        self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            initial=first,
            total=train.steps,
            unit="step",
            dynamic_ncols=True,
            disable=not terminal,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of a step, counted from 1."""
        if not self.enabled:
            return
        # JSON has no NaN: what is not a finite number is null.
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}))
        self._write_board(step, values)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})
        if "train/loss" in values:
            self._bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar where there is one, and log it."""
        if self.enabled:
            log.info("%s", text)
            with _console_may_be_gone():
                tqdm.write(text, file=sys.stderr)

    def advance(self) -> None:
        """Move the progress bar by a step."""
        if self.enabled:
            with _console_may_be_gone():
                self._bar.update()

    @property
    def shows_bar(self) -> bool:
        """True if the terminal has a progress bar, which plain lines would only repeat."""
        return self.enabled and not self._bar.disable

    def close(self) -> None:
        """Close the files, and end the run at Weights & Biases."""
        if self.enabled:
            with _console_may_be_gone():
                self._bar.close()
            self._file.close()
            self._close_board()
            threading.excepthook = self._excepthook
            if self._wandb is not None:
                self._wandb.finish(exit_code=int(sys.exc_info()[0] is not None))

    def _write_board(self, step: int, values: dict[str, float]) -> None:
        try:
            if self._board is None and not self._file.failing:
                self._board = SummaryWriter(
                    str(self._folder / "tensorboard"), purge_step=self._purge
                )
                self._purge = None
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
                self._board_failing = False
        except OSError as error:  # also of its thread, which is over then
            if not self._board_failing:
                log.warning(
                    "TensorBoard's file in %s cannot be written (%s): a new one will be",
                    self._folder / "tensorboard",
                    error,
                )
            self._board_failing = True
            self._close_board()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Leave out the traceback of TensorBoard's thread: its next write raises the same."""
        if not isinstance(failure.exc_value, OSError):
            self._excepthook(failure)

    def _close_board(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            with suppress(OSError):  # the disk is still full
                board.close()


def _console_may_be_gone() -> suppress:
    """Let a run go on without its terminal, or a full disk that standard error goes to."""
    return suppress(OSError)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without damaged ones (a kill may cut the last line)."""
    lines = []
    for text in read_small(path, MOST_METRICS).decode(errors="replace").splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def numbers(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of every line that has a number under the key, which a float can hold:
    others may have written there.
    """
    pairs = ((line["step"], line.get(key)) for line in lines)
    return [
        (step, float(value))
        for step, value in pairs
        if isinstance(value, int | float)
        # NaN and infinite losses are floats; integers of JSON may have any number of digits.
        and all(isinstance(one, float) or one.bit_length() < 64 for one in (step, value))
    ]
