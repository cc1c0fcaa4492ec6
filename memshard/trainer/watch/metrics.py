"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from memshard.io import atomic_write
from memshard.trainer.run import Run
from memshard.trainer.watch import weights_and_biases

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Rank 0's writer; other ranks write nothing. Lines after the step a run (re)starts from, which
    an earlier one left, are dropped.
    """

    def __init__(self, run: Run) -> None:
        self.enabled = run.rank == 0
        if not self.enabled:
            return
        folder, first, settings = run.folder, run.progress.step, run.recipe.train
        path = folder / METRICS_FILE
        kept = (
            [line for line in read_metrics(path) if line["step"] <= first] if path.exists() else []
        )
        with atomic_write(path) as file:  # a kill must not cost the lines that are kept
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        self._wandb = weights_and_biases.begin(folder, run.recipe, kept) if settings.wandb else None
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            initial=first,
            total=settings.steps,
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
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})
        if "train/loss" in values:
            self._bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)

    def say(self, text: str) -> None:
        """A line for the person who watches, above the progress bar where there is one, and for the
        log.
        """
        if self.enabled:
            log.info("%s", text)
            tqdm.write(text, file=sys.stderr)

    def advance(self) -> None:
        """One step further."""
        if self.enabled:
            self._bar.update()

    @property
    def shows_bar(self) -> bool:
        """Whether a progress bar is on the terminal, so that plain lines would only repeat it."""
        return self.enabled and not self._bar.disable

    def close(self) -> None:
        """Flush everything."""
        if self.enabled:
            self._bar.close()
            self._file.close()
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=int(sys.exc_info()[0] is not None))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; damaged ones, such as a last line that a kill cut short, are
    left out.
    """
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
