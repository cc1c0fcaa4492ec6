"""Repeat part of a network in backward without repeating what must happen once.

Example. A block with a memory is checkpointed: forward keeps only its input, and backward runs it a
second time to have its activations. Matrix products may be repeated, but the table read may not:
each run would send the rows over the network again, and on several ranks all of them would have to
repeat it in the same order. Batch statistics must not count the tokens twice either. So such calls
go through `run_once`:

    forward, first run      sums = run_once(replay, table_sum, weights)
                            calls table_sum(weights) on a detached copy of `weights`, and keeps
                            result and graph in `replay`
    backward, second run    sums = run_once(replay, table_sum, weights)
                            returns the kept result; nothing is read
    backward                the gradient of `sums` goes into the kept graph: the table collects its
                            read once, and the gradient of the kept copy is handed on as that of
                            the second run's `weights`, which are bit for bit the same

The first run is often under `no_grad`, as in checkpointing and reversible blocks. The graph inside
`run_once` is built all the same, since backward needs exactly this one. What it keeps is small
compared with the block: indices, weights and row numbers.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memshard.models import compat
from memshard.models.once import Saved, differentiable_once


class Replay:
    """The calls that one pass keeps for its repetition: result and autograd graph of each."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._next: int | None = None

    @property
    def repeating(self) -> bool:
        """True in the repetition."""
        return self._next is not None

    def repeat(self) -> AbstractContextManager[None]:
        """Mark the repetition, which must make the same calls in the same order.

        The context may be entered again: a backward pass that keeps its graph can be repeated.
        """
        return _Repetition(self)

    def keep(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> "_Kept":
        """Return the call that was kept, in the repetition, or make and keep it."""
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
    """Call function(*inputs) in the first pass; in the repetition return that result and reuse its
    autograd graph.

    extra_inputs: other tensors that `function` reads and that need gradients. Without a `replay`
    it is a plain call.
    """
    if replay is None:
        return function(*inputs)
    kept = replay.keep(function, inputs)
    result: Tensor = _Once.apply(kept, len(inputs), *inputs, *extra_inputs)
    return result


@dataclass(frozen=True)
class _Repetition(AbstractContextManager[None]):
    replay: Replay

    def __enter__(self) -> None:
        self.replay._next = 0

    def __exit__(self, *error: object) -> None:
        self.replay._next = None


class _Kept:
    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        # Under no_grad we still build this graph, because backward will need it. Otherwise the
        # surrounding checkpoint's hooks would drop its saved tensors, so we shield it from them.
        shield = (
            torch.autograd.graph.saved_tensors_hooks(_same, _same)
            if torch.is_grad_enabled()
            else nullcontext()
        )
        with torch.enable_grad(), shield:
            # Leaves of a graph of its own: `_Once.backward` takes gradients up to here and hands
            # them to the graph of the pass that is alive.
            self.inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
            self.output = function(*self.inputs)

    def release(self) -> None:
        """Drop the graph. The result stays: a repetition may still ask for it."""
        self.inputs, self.output = [], self.output.detach()


class _Once(torch.autograd.Function):
    """Connect a kept graph to this pass's inputs, which equal bit for bit those it was built on."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, inputs: int, *tensors: Tensor) -> Tensor:
        ctx.kept, ctx.extra_inputs = kept, tensors[inputs:]
        # Another tensor of the same memory: autograd hangs this pass's node on what is returned.
        return kept.output.detach()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        kept, keep_graph = ctx.kept, compat.backward_keeps_graph()
        sources = [*kept.inputs, *ctx.extra_inputs]
        # autograd.grad refuses inputs that need no gradient, such as integer row numbers.
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        # Asked here, since the pass below names all it is given. A table would learn from it.
        wanted = [i for i in needed if i < len(kept.inputs) or compat.backward_wants(sources[i])]
        gradients: list[Tensor | None] = [None] * len(sources)
        computed = torch.autograd.grad(
            kept.output,
            [sources[i] for i in wanted],
            upstream,
            allow_unused=True,
            retain_graph=keep_graph,
        )
        for i, gradient in zip(wanted, computed, strict=True):
            gradients[i] = gradient
        if not keep_graph:
            kept.release()
        return None, None, *gradients


def _same(x: Tensor) -> Tensor:
    return x
