"""Triton's kernels on fake CUDA tensors: counted, not run; plain torch computes their numbers."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from tests.gpu.watch import values_of


def _nobody(what: str) -> None:
    """Take no note."""


launched: Callable[[str], None] = _nobody
"""Told of every launch."""


def install() -> None:
    """Count Triton's launches in this process, and let memshard take its kernels for fake tensors.

    Before memshard is imported, which then finds what is changed here.
    """
    from memshard.models import compat

    traced, fake = compat.is_traced, compat.is_fake
    compat.is_traced = lambda x: not x.is_cuda and traced(x)
    compat.is_fake = lambda x: not x.is_cuda and fake(x)
    from triton.runtime.jit import JITFunction

    from memshard.models.kernels import backend, triton_rows

    # It compares numbers, which kernels that do not run have none of.
    backend.row_backend_fault = lambda *_: None
    JITFunction.run = _launch
    for name in ("gather_sum", "score_gradients", "segment_sums", "adam_rows"):
        setattr(triton_rows, name, _with_numbers(name, getattr(triton_rows, name)))


def _launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Tensor) and not argument.is_cuda:
            raise ValueError(f"Pointer argument of {kernel.__name__} is a CPU tensor")
    launched(f"triton {kernel.__name__}")


def _with_numbers(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the Triton backend whose results have the numbers of plain torch."""
    from memshard.models.kernels import plain_rows

    plain = getattr(plain_rows, name)

    def run(*args: Any) -> Any:
        out = function(*args)
        numbers = [_numbers(x) for x in args]
        if None not in numbers:
            result = plain(*numbers)
            if out is not None:
                out.known_values = result
        return out

    return run


def _numbers(argument: Any) -> Any:
    """Return the argument with numbers in place of fakes; None if they are not known."""
    if isinstance(argument, Tensor):
        return values_of(argument)
    # An AdamUpdate.
    tensors = {
        field.name: getattr(argument, field.name)
        for field in fields(argument)
        if isinstance(getattr(argument, field.name), Tensor)
    }
    numbers = {name: values_of(x) for name, x in tensors.items()}
    return None if None in numbers.values() else replace(argument, **numbers)
