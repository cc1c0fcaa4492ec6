"""Triton's kernels on fake CUDA tensors: counted, not run; plain torch computes their numbers."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
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

    from memshard.models.fast_weights.delta_rule import PLAIN, plain_scan
    from memshard.models.kernels import (
        backend,
        delta_steps,
        dropout,
        plain_rows,
        scan,
        triton_delta,
        triton_dropout,
        triton_lookup,
        triton_rows,
        triton_scan,
    )
    from memshard.models.random import plain_dropout

    # They compare numbers, which kernels that do not run have none of.
    backend.row_backend_fault = lambda *_: None
    backend.lookup_agrees = dropout.agrees = scan.agrees = delta_steps.agrees = lambda *_: True
    JITFunction.run = _launch
    for name in ("gather_sum", "score_gradients", "segment_sums", "adam_rows"):
        plain = getattr(plain_rows, name)
        setattr(triton_rows, name, _with_numbers(getattr(triton_rows, name), plain))
    triton_dropout.dropped = _with_numbers(triton_dropout.dropped, plain_dropout)
    kernels = delta_steps.Steps(*map(_with_numbers, triton_delta.steps(), PLAIN))
    triton_delta.steps = lambda: kernels
    triton_scan.scan = _with_numbers(triton_scan.scan, plain_scan)
    triton_lookup.look_up = _with_numbers(triton_lookup.look_up, _look_up)
    triton_lookup.gradients = _with_numbers(triton_lookup.gradients, _gradients)


def _launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Tensor) and not argument.is_cuda:
            raise ValueError(f"Pointer argument of {kernel.__name__} is a CPU tensor")
    launched(f"triton {kernel.__name__}")


def _with_numbers(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the Triton backend whose results have the numbers of plain torch."""

    def run(*args: Any) -> Any:
        out = function(*args)
        numbers = [_numbers(x) for x in args]
        if any(x is None and of is not None for x, of in zip(numbers, args, strict=True)):
            return out
        result = plain(*numbers)
        pairs = zip(out, result, strict=True) if isinstance(out, tuple) else [(out, result)]
        for fake, values in pairs:
            if fake is not None:
                fake.known_values = values
        return out

    return run


def _look_up(
    queries: Tensor, sub_keys: Tensor, k: int, weighting: str, precision: str = "fp32"
) -> Tensor:
    """Do what `triton_lookup.look_up` does, in plain torch."""
    rows, weights = _looked_up(queries.float(), sub_keys.float(), k, weighting)
    return torch.stack((rows.int(), weights.view(torch.int32)))


def _gradients(
    queries: Tensor,
    sub_keys: Tensor,
    rows: Tensor,
    weights: Tensor,
    upstream: Tensor,
    weighting: str,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, ...]:
    """Do what `triton_lookup.gradients` does, in plain torch."""
    with torch.enable_grad():
        leaves = [x.detach().float().requires_grad_() for x in (queries, sub_keys)]
        looked_up = _looked_up(*leaves, rows.shape[-1], weighting)[1]
    gradients = torch.autograd.grad(looked_up, leaves, upstream)
    return tuple(x.to(of.dtype) for x, of in zip(gradients, (queries, sub_keys), strict=True))


def _looked_up(queries: Tensor, sub_keys: Tensor, k: int, weighting: str) -> tuple[Tensor, Tensor]:
    from memshard.models.memory.product_key import slot_rows, weigh
    from memshard.models.memory.product_topk import product_topk

    halves, keys = queries.unflatten(-1, (2, -1)).unbind(-2), sub_keys.unbind(1)
    first, second = (torch.einsum("thd,hnd->thn", *pair) for pair in zip(halves, keys, strict=True))
    scores, i1, i2 = product_topk(first, second, k)
    return slot_rows(i1, i2, sub_keys.shape[2]), weigh(scores, weighting)


def _numbers(argument: Any) -> Any:
    """Return the argument with numbers in place of fakes; None if they are not known."""
    if isinstance(argument, Tensor):
        return values_of(argument)
    if not is_dataclass(argument):
        return argument
    tensors = {
        field.name: getattr(argument, field.name)
        for field in fields(argument)
        if isinstance(getattr(argument, field.name), Tensor)
    }
    numbers = {name: values_of(x) for name, x in tensors.items()}
    return None if None in numbers.values() else replace(argument, **numbers)
