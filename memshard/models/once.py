"""Backward passes that cannot be differentiated again, and say so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Saved = tuple[Tensor, ...]
Gradients = Tensor | tuple[Tensor | None, ...]


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make `backward(ctx, saved, *upstream)` a backward pass of which a second derivative raises
    NotImplementedError. saved: `ctx.saved_tensors`.

    torch's `once_differentiable` does so only where upstream gradients are the reason, and only in
    `Tensor.backward`: `torch.autograd.grad` returns what is left, without an error.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor) -> Gradients:
        # Once: activation checkpointing computes them again and hands them out a single time.
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            gradients: Gradients = backward(ctx, saved, *upstream)
            return gradients
        with torch.no_grad():
            gradients = backward(ctx, saved, *upstream)
        sources = [x for x in (*upstream, *saved) if x is not None and x.requires_grad]
        if not sources:
            return gradients
        if isinstance(gradients, Tensor):
            return _Once.apply(gradients, *sources)
        return tuple(x if x is None else _Once.apply(x, *sources) for x in gradients)

    return wrapped


class _Once(torch.autograd.Function):
    """apply(gradient, *sources): the gradient, which depends on the sources in a way not known."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        # Not a view: the backward pass that it is handed to may write to it.
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> None:
        raise NotImplementedError(
            "memories, and mixers with a backward pass of their own, have no second derivative: "
            "differentiate their output once, or give them x.detach() where gradients of gradients "
            "are taken"
        )
