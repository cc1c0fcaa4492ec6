"""What a stage is given."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Result = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """on: the kind of device to measure, cuda or cpu; a CPU only rehearses, at sizes that fit it.
    out: the folder of the results. scratch: a folder for runs and data. data: a data folder with
    real text, if the user named one. seconds: after which the stage is killed.
    """

    on: str
    out: Path
    scratch: Path
    data: Path | None = None
    seconds: float = 60.0
    begun: float = field(default_factory=time.monotonic)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.on == "cuda"

    @cached_property
    def device(self) -> "torch.device":
        """The device, which is the first one."""
        import torch

        return torch.device("cuda", 0) if self.cuda else torch.device("cpu")

    def left(self) -> float:
        """Return the seconds that the stage has left, less a reserve for its end."""
        return 0.9 * self.seconds - (time.monotonic() - self.begun)

    def wait(self) -> None:
        """Wait until the device has done all that it was asked for."""
        if self.cuda:
            import torch

            torch.cuda.synchronize(self.device)


def tried(work: Callable[[], Result]) -> Result:
    """Return the result of some work, or what went wrong: one failure must not hide the others."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"problem": f"{type(error).__name__}: {error}"[:500], "ok": False}


def tried_each(
    bench: Bench, names: Iterable[str], work: Callable[[str], Result]
) -> Iterator[tuple[str, Result]]:
    """Yield the result of some work for every name, as long as the stage has time."""
    for name in names:
        if bench.left() < 0:
            yield name, {"skipped": "no time left"}
        else:
            yield name, tried(partial(work, name))
