"""Workers on a Ray cluster (extra `ray`): tasks go to any of its machines, which have to see text
and folder under the same paths.
"""

import time
from collections import deque
from typing import Any

from memshard.search.evolve.journal import Event
from memshard.search.evolve.workers import Work, lost


class RayWorkers:
    """Run up to `count` tasks at a time, with one core and `gpus` GPUs each.

    address: address of a cluster, or `local` to start one here. ValueError without Ray. There is no
    memory limit here: Ray guards memory, and its processes outlive a task and map more than they
    use.
    """

    def __init__(self, work: Work, count: int, timeout: float, address: str, gpus: int = 0) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ValueError("--ray needs Ray: pip install 'memshard[ray]'") from error
        place: dict[str, Any] = (
            {"num_cpus": count, "include_dashboard": False}
            if address == "local"
            else {"address": address}
        )
        ray.init(log_to_driver=False, **place)
        self.count = count
        self._ray: Any = ray
        self._work = ray.remote(num_cpus=1, num_gpus=gpus, num_returns="streaming", max_retries=0)(
            work
        )
        self._timeout = timeout
        self._waiting: deque[Any] = deque()
        # stream of events -> its task and when it was last heard, 0.0 before its first event
        self._running: dict[Any, tuple[Any, float]] = {}

    def submit(self, task: Any) -> None:
        """Queue a task."""
        self._waiting.append(task)
        self._hand_out()

    def poll(self, seconds: float) -> list[Event]:
        """Return the events that have come in, after at most `seconds`."""
        events: list[Event] = []
        streams = list(self._running)
        ready = self._ray.wait(streams, num_returns=len(streams), timeout=0)[0] if streams else []
        # First all that is ready; only if nothing is, wait for the next event.
        ready = ready or (
            self._ray.wait(streams, num_returns=1, timeout=seconds)[0] if streams else []
        )
        for stream in ready:
            task, _ = self._running.pop(stream)
            try:
                event: Event = self._ray.get(next(stream))
                events.append(event)
                self._running[stream] = task, time.monotonic()
            except StopIteration:
                pass
            except self._ray.exceptions.RayError as error:
                events.append(
                    lost(task, f"its Ray worker died: {str(error).splitlines()[0][:200]}")
                )
        # A task that has not begun (heard 0.0) waits for a free machine, which may take hours.
        for stream, (task, heard) in list(self._running.items()):
            if heard and time.monotonic() - heard > self._timeout:
                self._ray.cancel(stream, force=True)
                del self._running[stream]
                events.append(lost(task, f"no sign of life for {self._timeout:g} s", silent=True))
        self._hand_out()
        return events

    def close(self) -> None:
        """End all tasks, and a cluster that was started here."""
        for stream in self._running:
            self._ray.cancel(stream, force=True)
        self._ray.shutdown()

    def _hand_out(self) -> None:
        while self._waiting and len(self._running) < self.count:
            task = self._waiting.popleft()
            self._running[self._work.remote(task)] = task, 0.0
