"""What torch.cuda answers where the device is a fake one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

capability = (9, 0)


def _nobody(what: str) -> None:
    """Take no note."""


waited: Callable[[str], None] = _nobody
"""Told of every wait for a stream, an event or the device."""


class Stream:
    """A stream of the device; all run in the order of the calls."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.cuda_stream = 0

    def synchronize(self) -> None:
        waited("stream.synchronize")

    def wait_stream(self, stream: "Stream") -> None:
        """The device waits, the host does not."""

    def wait_event(self, event: "Event") -> None:
        """The device waits, the host does not."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def query(self) -> bool:
        return True


class Event:
    """An event of a stream, which is over at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        """Nothing is behind."""

    def wait(self, stream: Stream | None = None) -> None:
        """The device waits, the host does not."""

    def synchronize(self) -> None:
        waited("event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


_STREAM = Stream()


@contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    global _STREAM
    before, _STREAM = _STREAM, stream or _STREAM
    try:
        yield
    finally:
        _STREAM = before


def install() -> None:
    """Let torch.cuda speak of one device from now on."""
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda device=None: nullcontext(),
        "device_of": lambda tensor: nullcontext(),
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "NVIDIA H200",
        "get_arch_list": lambda: ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda device=None: (139 << 30, 141 << 30),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        # The device draws from the CPU's generator.
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "synchronize": lambda device=None: waited("torch.cuda.synchronize"),
        "current_stream": lambda device=None: _STREAM,
        "default_stream": lambda device=None: Stream(),
        "stream": _stream,
        "Stream": Stream,
        "Event": Event,
    }
    # A function each: torch._dynamo wants to know them apart.
    silent: dict[str, Callable[..., Any]] = {
        name: lambda *_, **__: None
        for name in (
            "init",
            "_lazy_init",
            "set_device",
            "empty_cache",
            "reset_peak_memory_stats",
            "manual_seed",
            "manual_seed_all",
            "set_rng_state",
        )
    }
    for name, answer in (answers | silent).items():
        setattr(torch.cuda, name, answer)
