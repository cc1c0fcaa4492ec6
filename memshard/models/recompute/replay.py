"""Running part of a network again in backward without repeating what must happen once: table reads,
sums over ranks, statistics.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Replay:
    """What one pass keeps for its repetition: result and autograd graph of each `run_once`."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._next: int | None = None

    @property
    def repeating(self) -> bool:
        """Whether this is the repetition."""
        return self._next is not None

    @contextmanager
    def repeat(self) -> Iterator[None]:
        """The repetition: it must ask for the same things in the same order."""
        self._next = 0
        try:
            yield
        finally:
            self._next = None

    def keep(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> "_Kept":
        """The call as it was kept, or a new one."""
        if self._next is None:
            self._kept.append(_Kept(function, inputs))
            return self._kept[-1]
        self._next += 1
        return self._kept[self._next - 1]


def run_once(
    replay: Replay | None,
    function: Callable[..., Tensor],
    *inputs: Tensor,
    extra_inputs: Sequence[Tensor] = (),
) -> Tensor:
    """function(*inputs); in a repetition the first pass's result, and for backward its graph.

    extra_inputs: other tensors that `function` reads and that need gradients. Without a `replay`
    it is a plain call.
    """
    if replay is None:
        return function(*inputs)
    return _Once.apply(replay.keep(function, inputs), len(inputs), *inputs, *extra_inputs)


class _Kept:
    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        # A pass without gradients keeps this graph all the same; one with them drops what is saved,
        # by hooks, to compute it again.
        own = (
            torch.autograd.graph.saved_tensors_hooks(_same, _same)
            if torch.is_grad_enabled()
            else nullcontext()
        )
        with torch.enable_grad(), own:
            self.inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
            self.output = function(*self.inputs)

    def release(self) -> None:
        """Drop the graph. The result stays: a repetition may still ask for it."""
        self.inputs, self.output = [], self.output.detach()


class _Once(torch.autograd.Function):
    """Joins a kept graph to the inputs of this pass, which are bit for bit those it was built
    from.
    """

    @staticmethod
    def forward(ctx: Any, kept: _Kept, inputs: int, *tensors: Tensor) -> Tensor:
        ctx.kept, ctx.extra_inputs = kept, tensors[inputs:]
        return kept.output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        kept, keep_graph = ctx.kept, torch._C._autograd._get_current_graph_task_keep_graph()
        sources = [*kept.inputs, *ctx.extra_inputs]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        found = torch.autograd.grad(
            kept.output,
            [sources[i] for i in wanted],
            upstream,
            allow_unused=True,
            retain_graph=keep_graph,
        )
        if not keep_graph:
            kept.release()
        gradients: list[Tensor | None] = [None] * len(sources)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return None, None, *gradients


def _same(x: Tensor) -> Tensor:
    return x
