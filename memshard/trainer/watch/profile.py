"""A trace of some steps, on request."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"


class StepProfiler:
    """Records steps as FOLDER/rank<N>.pt.trace.json in the run's folder, for Perfetto,
    chrome://tracing or TensorBoard. A context manager: a run that ends early writes what it has.

    steps: the first and last one, counted from 1; None records nothing.
    """

    def __init__(self, folder: Path, rank: int, steps: tuple[int, int] | None) -> None:
        self.path = folder / FOLDER / f"rank{rank}.pt.trace.json"
        # Steps count from 1, so 0 never comes.
        self.first, self.last = steps or (0, 0)
        self._profile: profile | None = None

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def begin(self, step: int) -> None:
        """Start recording if this step, counted from 1, is the first one to record."""
        if step == self.first:
            activities = [ProfilerActivity.CPU] + [
                ProfilerActivity.CUDA
            ] * torch.cuda.is_available()
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def end(self, step: int) -> None:
        """Write the trace if this step was the last one to record."""
        if step == self.last:
            self._finish()

    def _finish(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self.path.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(self.path))
            self._profile = None
