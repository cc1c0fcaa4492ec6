"""Normalisation of memory queries, which spreads the reads over the table.

Lample et al. 2019, section 4.5.
"""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from memshard.models import compat
from memshard.models.memory.kinds import QueryNormKind
from memshard.models.once import differentiable_once
from memshard.models.recompute.replay import Replay, run_once

_EPS = 1e-5
_MOMENTUM = 0.1


class QueryNorm(nn.Module):
    """Normalise queries of shape [tokens, heads, key_dim].

    kind:
        batch       By mean and variance of each feature over the batch; by running statistics in
                    evaluation. Mixes positions.
        lagged      By the running statistics of earlier steps, in training as well: causal.
        layer       Each query by its own mean and variance.
        layer-half  Each half of a query by its own mean and variance.
        rms         Each query by its own root mean square.
        none        Not at all.

    Statistics cover the tokens that are passed in: leave padding out. `reduce` sums a tensor over
    the ranks that share a batch and lets gradients through; `parallel/` sets it. With `deferred`,
    running statistics are collected and enter at `commit`, so that a skipped step does not change
    them; otherwise they enter at once, as in torch's BatchNorm. They stay in fp32 when the layer is
    cast to 16 bits, which do not resolve a tenth of a small difference.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        kind: QueryNormKind,
        heads: int,
        key_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in get_args(QueryNormKind):
            raise ValueError(
                f"query_norm is {kind!r}; choose one of {', '.join(get_args(QueryNormKind))}"
            )
        self.kind = kind
        self.tracks_statistics = kind in ("batch", "lagged")
        self.reduce: Callable[[Tensor], Tensor] = _alone
        self.deferred = False
        self._collected: list[tuple[Tensor, Tensor]] = []
        scale = torch.empty(heads, key_dim, device=device, dtype=dtype)
        self.weight = nn.Parameter(scale) if kind != "none" else None
        self.bias = nn.Parameter(torch.empty_like(scale)) if kind not in ("none", "rms") else None
        if self.tracks_statistics:
            wide = torch.promote_types(scale.dtype, torch.float32)
            self.register_buffer("running_mean", torch.empty_like(scale, dtype=wide))
            self.register_buffer("running_var", torch.empty_like(scale, dtype=wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set identity scale and shift, and mean 0 and variance 1 for unknown statistics."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.tracks_statistics:
            self.running_mean.zero_()
            self.running_var.fill_(1)

    def extra_repr(self) -> str:
        """Return the kind."""
        return self.kind

    def forward(self, z: Tensor, replay: Replay | None = None) -> Tensor:
        """Return normalised queries of z's shape [tokens, heads, key_dim], in fp32 at least.

        A repetition uses the statistics of the first pass.
        """
        z = z.float() if z.dtype.itemsize < 4 else z
        # Not in a pass that backward repeats, whose statistics are taken once.
        if replay is None and self._fits_torch(z):
            return self.by_torch(z)
        if self.tracks_statistics and self.weight is not None and self.bias is not None:
            centred, var = self._centred(z, replay)
            return torch.addcmul(self.bias, centred, self.weight * torch.rsqrt(var + _EPS))
        if self.kind == "layer":
            z = nn.functional.layer_norm(z, z.shape[-1:], eps=_EPS)
        elif self.kind == "layer-half":
            # Each half is scored against its own sub-keys, so each is brought to one scale.
            halves = z.unflatten(-1, (2, -1))
            z = nn.functional.layer_norm(halves, halves.shape[-1:], eps=_EPS).flatten(-2)
        elif self.kind == "rms":
            z = nn.functional.rms_norm(z, z.shape[-1:], eps=_EPS)
        if self.weight is not None:
            z = z * self.weight
        return z if self.bias is None else z + self.bias

    def commit(self) -> None:
        """Add the statistics collected since the last commit, averaged over the passes, to the
        running ones.
        """
        if self._collected:
            means, variances = zip(*self._collected, strict=True)
            # One update a step, however many micro-batches it has: 0.1 then means the same for all
            # of them.
            for name, measured in (("running_mean", means), ("running_var", variances)):
                running = getattr(self, name)
                if running.dtype.itemsize < 4:
                    # A loader that replaces buffers has given it the dtype of the weights.
                    running = running.float()
                    setattr(self, name, running)
                mean = measured[0] if len(measured) == 1 else torch.stack(measured).mean(0)
                running.lerp_(mean.to(running.dtype), _MOMENTUM)
        self._collected.clear()

    def discard(self) -> None:
        """Drop the statistics collected since the last commit: the step was skipped."""
        self._collected.clear()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            # Cast to 16 bits: keep the fp32 statistics, on the new device.
            if buffer is not None and after is not None and after.dtype.itemsize < 4:
                self._buffers[name] = buffer.to(after.device, torch.float32)
        return self

    def _fits_torch(self, z: Tensor) -> bool:
        """Return whether torch's batch norm takes these queries, on a GPU: it knows no other ranks
        and no single token, and on a CPU it is no faster.
        """
        return (
            z.is_cuda
            and self.training
            and self.kind == "batch"
            and self.reduce is _alone
            and len(z) > 1
            and not torch.compiler.is_compiling()
        )

    def by_torch(self, z: Tensor) -> Tensor:
        """Normalise by the batch with torch's kernels: 10 launches a step in place of 45."""
        assert self.weight is not None and self.bias is not None
        weight, bias = (x.to(z.dtype).flatten() for x in (self.weight, self.bias))
        # Running statistics that forget all that they were are those of the batch, the unbiased
        # variance among them.
        mean, var = z.new_zeros(2, len(weight))
        y: Tensor = torch.native_batch_norm(z.flatten(1), weight, bias, mean, var, True, 1.0, _EPS)[
            0
        ]
        if not compat.in_backward():
            self._collect(mean.view(z.shape[1:]), var.view(z.shape[1:]))
        return y.view(z.shape)

    def _collect(self, mean: Tensor, var: Tensor) -> None:
        self._collected.append((mean.detach(), var.detach()))
        if not self.deferred:
            self.commit()

    def _centred(self, z: Tensor, replay: Replay | None) -> tuple[Tensor, Tensor]:
        """Return z minus the mean to normalise by, and the variance."""
        repeating = replay is not None and replay.repeating
        if self.training and self.kind == "batch":
            return self._measure(z, replay, not repeating)
        if not self.training:
            return z - self.running_mean, self.running_var
        if replay is None and not torch.compiler.is_compiling() and compat.in_backward():
            raise RuntimeError(
                'query_norm="lagged" cannot be computed again in backward by torch\'s activation '
                "checkpointing: its statistics have moved since; leave the layer out, or choose "
                '"batch" or "layer"'
            )
        # This pass must not see its own statistics, nor its repetition those that have moved since.
        mean, var = (
            run_once(replay, self.running_mean.clone),
            run_once(replay, self.running_var.clone),
        )
        if not repeating:
            with torch.no_grad():
                self._measure(z, None, collect=True)
        return z - mean, var

    def _measure(self, z: Tensor, replay: Replay | None, collect: bool) -> tuple[Tensor, Tensor]:
        """Return z minus its mean, and the biased variance, over the tokens of all ranks.

        The unbiased variance goes to the running statistics.
        """
        count = run_once(replay, self.reduce, z.new_full((), float(z.shape[0])))
        mean = run_once(replay, self.reduce, z.sum(0)) / count.clamp(min=1)
        # Mean first, then squares of differences: E[z^2] - mean^2 would cancel
        # where means are large.
        centred = z + -mean  # the gradient of z - mean would be negated before it is summed
        squares = (
            # A compiler fuses these, and warns of autograd functions.
            centred.square().sum(0) if torch.compiler.is_compiling() else _SumSquares.apply(centred)
        )
        var = run_once(replay, self.reduce, squares) / count.clamp(min=1)
        # No tokens anywhere, as in a batch of padding: the variance 0 is no measurement. Alone, the
        # shape says so, on which a compiled graph may depend.
        # Nor may a batch count twice, if torch's activation checkpointing runs the layer again.
        again = not torch.compiler.is_compiling() and compat.in_backward()
        if collect and not again and (self.reduce is not _alone or len(z) > 0):
            # As in BatchNorm: normalise by the biased variance, keep the unbiased one.
            unbiased = var.detach() * (count / (count - 1).clamp(min=1))
            if self.reduce is not _alone:
                # The device alone knows whether another rank has tokens.
                none = count == 0
                mean = torch.where(none, self.running_mean.to(mean.dtype), mean.detach())
                unbiased = torch.where(none, self.running_var.to(mean.dtype), unbiased)
            self._collect(mean, unbiased)
        return centred, var


class _SumSquares(torch.autograd.Function):
    """Sum squares over tokens. Backward makes one tensor as large as x; torch's makes three."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.square().sum(0)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, gradient):  # type: ignore[no-untyped-def]
        (x,) = saved
        return x * (2 * gradient)


def _alone(x: Tensor) -> Tensor:
    """Return the sum over one rank; a named function, so that the layer can be pickled."""
    return x
