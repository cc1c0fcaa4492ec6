"""A trace of some steps, on request."""

import torch
from torch.profiler import ProfilerActivity, profile

from memshard.trainer.run import Run

FOLDER = "profile"


class StepProfiler:
    """Records the steps train.profile names, as profile/rank<N>.pt.trace.json in the run's folder:
    for Perfetto, chrome://tracing or TensorBoard. A context manager; a run that ends early
    writes what it has.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.first, self.last = run.recipe.train.profile or (0, 0)
        self._profile: profile | None = None

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def begin(self, step: int) -> None:
        """Before a step, counted from 1."""
        if step == self.first:
            activities = [ProfilerActivity.CPU] + [
                ProfilerActivity.CUDA
            ] * torch.cuda.is_available()
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def end(self, step: int) -> None:
        """After a step."""
        if step == self.last:
            self._finish()

    def _finish(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            folder = self.run.folder / FOLDER
            folder.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(folder / f"rank{self.run.rank}.pt.trace.json"))
            self._profile = None
