"""The delta rule inside its chunks by Triton kernels, where they are there and agree with torch."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from memshard.models.compat import is_traced
from memshard.models.kernels.tested import tested_kernel

_MOST_FEATURES, _LONGEST_CHUNK = 128, 64


class Steps(NamedTuple):
    """What is done to all chunks at once, before and after the scans of both directions; see the
    functions of `fast_weights.delta_rule`.
    """

    solve: Callable[..., tuple[Tensor, ...]]
    read: Callable[..., Tensor]
    begin: Callable[..., tuple[Tensor, ...]]
    end: Callable[..., tuple[Tensor, ...]]


def steps_for(q: Tensor, v: Tensor, plain: Steps) -> Steps:
    """Return what serves such chunks without decay or resets; `plain` is the reference, in torch.

    q: [..., C, D]; v: [..., C, M].
    """
    fits = max(q.shape[-1], v.shape[-1]) <= _MOST_FEATURES and q.shape[-2] <= _LONGEST_CHUNK
    if not q.is_cuda or q.dtype != torch.float32 or not fits or is_traced(q):
        return plain
    return _kernels(q.device, plain, (q.shape[-1], v.shape[-1], q.shape[-2])) or plain


@cache
def _kernels(device: torch.device, plain: Steps, sizes: tuple[int, int, int]) -> Steps | None:
    """Compile and test the kernels at the first call for a device and sizes, which some GPUs have
    not the room for.
    """
    kernels = tested_kernel(
        device, "triton_delta:steps", lambda ours: agrees(ours(), plain, device, *sizes)
    )
    return None if kernels is None else kernels()


@torch.no_grad()
def agrees(
    ours: Steps, plain: Steps, device: torch.device, features: int, width: int, chunk: int
) -> bool:
    """Return whether all steps give the same, each from what plain torch gives before it."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, 2, 2, *shape, generator=random).to(device)

    q, k = (draw(chunk, features) / features**0.5 for _ in range(2))
    v, d_out, read, passed = (draw(chunk, width) for _ in range(4))
    beta, states, d_ends = draw(chunk, 1).sigmoid(), draw(features, width), draw(features, width)
    inverse, _, writes, _ = plain.solve(k, v, beta)
    begun = q, k, v, beta, inverse, states, d_out
    errors, written, _, d_writes, _ = plain.begin(*begun)
    ended = q, k, beta, inverse, states, d_out, errors, written, d_writes + passed, d_ends
    calls = ((k, v, beta), (q, k, writes - read, states), begun, ended)
    for step, reference, tensors in zip(ours, plain, calls, strict=True):
        pair = (function(*tensors) for function in (step, reference))
        a, b = (x if isinstance(x, tuple) else (x,) for x in pair)
        if not all(torch.allclose(*x, rtol=1e-4, atol=1e-4) for x in zip(a, b, strict=True)):
            return False
    return True
