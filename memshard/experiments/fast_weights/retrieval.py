"""Associative retrieval (Schlag et al. 2021, section 6.1): write L pairs of a key and a value into
a memory, then read one key.

There are S keys and S values. Values are one-hot vectors; keys are learned. A model has no output
projection: what it reads from its memory is its answer, and its loss is half the squared distance
to the value last written under the key.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memshard.models.fast_weights.feature_maps import FeatureMap
from memshard.models.mixers.kinds import FeatureNorm
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.training import build_for_training, training_step

_KEY_DIM = 64
_SEQUENCES, _MOST_QUERIES = 20, 200
_EVAL_EVERY, _PATIENCE, SOLVED = 100, 10, 0.001


class PublishedFavor(FeatureMap):
    """FAVOR+ as published, without a guard against underflow.

    exp(-|x|^2 / 2) is 0 in fp32 for the long keys of this task; the published curve shows that.
    Takes `width` random directions, and is normalised as `normalise` says, without an epsilon.
    """

    def __init__(self, dim: int, width: int, normalise: FeatureNorm = "none") -> None:
        super().__init__("favor", dim, width, normalise)

    def _favor(self, x: Tensor) -> Tensor:
        assert self.directions is not None
        projected = x @ self.directions.to(x.dtype).mT
        y = (
            torch.cat((projected, -projected), -1).exp()
            * (-x.square().sum(-1, keepdim=True) / 2).exp()
        )
        y = y / self.features**0.5
        return y if self.normalise == "none" else y / y.sum(-1, keepdim=True)


FEATURES: dict[str, Callable[..., FeatureMap]] = {
    "elu": partial(FeatureMap, "elu"),
    **{f"dpfp-{width}": partial(FeatureMap, "dpfp", width=width) for width in (1, 2, 3)},
    **{f"favor-{width}": partial(FeatureMap, "favor", width=width) for width in (64, 128, 512)},
    "favor-64-published": partial(PublishedFavor, width=64),
}


class Retriever(nn.Module):
    """A model that writes a sequence of pairs into a memory and reads it once.

    symbols: S. features: a name of FEATURES, "softmax", or "tanh" (for the rule fwm). rule: sum
    (attention), delta, or fwm (Schlag et al. 2021 b: tanh or DPFP features, the memory's norm kept
    at 1 at most, the reading layer-normalised).
    """

    def __init__(self, symbols: int, features: str, rule: str) -> None:
        super().__init__()
        self.symbols, self.rule = symbols, rule
        width = int(1.1 * 2 * symbols)
        self.embedding = nn.Embedding(symbols, width)
        bound = _KEY_DIM**-0.5
        self.key_of_key, self.query = (
            nn.Linear(width, _KEY_DIM),
            nn.Linear(width, _KEY_DIM, bias=False),
        )
        self.key_of_value = nn.Embedding(symbols, _KEY_DIM)
        self.strength_of_key, self.strength_of_value = nn.Linear(width, 1), nn.Embedding(symbols, 1)
        for parameter in (self.key_of_key.weight, self.query.weight, self.key_of_value.weight):
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.uniform_(self.strength_of_value.weight, -bound, bound)
        # The sum rule divides by its sum, so scales of keys matter and of queries cancel.
        normalise = "none" if rule in ("sum", "fwm") else "sum"
        self.features = None
        if features not in ("softmax", "tanh"):
            self.features = FEATURES[features](dim=_KEY_DIM, normalise=normalise)
        self.tanh = features == "tanh"

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Return readings [batch, n, S]. keys, values: [batch, L]; queries: [batch, n]; int64."""
        k, q = self.keys_and_queries(keys, values, queries)
        if self.features is None and not self.tanh:
            return self._weighted((q @ k.mT * _KEY_DIM**-0.5).softmax(-1), values)
        if self.rule == "sum":
            scores = q @ k.mT
            return self._weighted(scores / (scores.sum(-1, keepdim=True) + 1e-6), values)
        beta = self.strengths(keys, values)
        if self.rule == "fwm":
            one_hot = F.one_hot(values, self.symbols).to(k.dtype)
            return F.layer_norm(q @ _bounded_delta_rule(k, one_hot, beta), (self.symbols,))
        # The memory is read only once, so it need not be built: with the letters of `delta_rule`,
        # y = (q K^T (I + A)^-1) diag(beta) V, one triangular solve for the query instead of one for
        # every value.
        weights = torch.linalg.solve_triangular(
            beta[..., None] * (k @ k.mT), q @ k.mT, upper=False, left=False, unitriangular=True
        )
        return self._weighted(weights * beta[:, None], values)

    def keys_and_queries(
        self, keys: Tensor, values: Tensor, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return features of keys [batch, L, features] and of queries [batch, n, features]."""
        # Project the S symbols, then gather: S rows through the matrix instead of batch x L.
        k = self.key_of_key(self.embedding.weight)[keys] + self.key_of_value.weight[values]
        q = self.query(self.embedding.weight)[queries]
        if self.tanh:
            return k.tanh(), q.tanh()
        return (k, q) if self.features is None else (self.features(k), self.features(q))

    def strengths(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return the delta rule's write strengths, [batch, L]."""
        return (
            (
                self.strength_of_key(self.embedding.weight)[keys]
                + self.strength_of_value.weight[values]
            )
            .sigmoid()
            .squeeze(-1)
        )

    def _weighted(self, weights: Tensor, values: Tensor) -> Tensor:
        """Return readings [batch, n, S] of one-hot values: weights [batch, n, L] added by value."""
        out = weights.new_zeros(*weights.shape[:2], self.symbols)
        return out.scatter_add(-1, values[:, None].expand_as(weights), weights)


def _bounded_delta_rule(k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """Return the memory [batch, D, S] after the delta rule step by step, divided by its norm
    whenever that exceeds 1.
    """
    memory = k.new_zeros(len(k), k.shape[-1], v.shape[-1])
    for key, value, strength in zip(k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
        error = value - torch.einsum("bd,bds->bs", key, memory)
        memory = memory + torch.einsum("bd,bs->bds", key, strength[:, None] * error)
        memory = memory / memory.flatten(1).norm(dim=-1).clamp(min=1)[:, None, None]
    return memory


def sample_pairs(
    symbols: int, length: int, batch: int, replace: bool, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw keys and values, [batch, length] int64 each, with or without replacement."""
    if replace:
        keys, values = (torch.randint(symbols, (batch, length), generator=random) for _ in range(2))
    else:
        keys, values = (
            torch.rand(batch, symbols, generator=random).argsort(-1)[:, :length] for _ in range(2)
        )
    return keys, values


def last_value(keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
    """Return the value last written under each query, [batch, n]."""
    places = torch.arange(keys.shape[1])
    # The highest place at which the key was written.
    latest = torch.where(keys[:, None] == queries[..., None], places, -1).amax(-1)
    return values.gather(1, latest)


def loss_of(readings: Tensor, values: Tensor) -> Tensor:
    """Return half the squared distance to one-hot values, the mean over readings."""
    return 0.5 * (readings - F.one_hot(values, readings.shape[-1])).square().sum(-1).mean()


def train(point: dict[str, Any]) -> dict[str, Any]:
    """Train on a point {symbols, features, rule, replace, steps, seed} until the task is solved
    (held-out loss below 0.001) or there is no progress for more than 1,000 steps.

    Return the best held-out loss, its step, and the curve [[step, loss], ...]; a loss of None
    diverged.
    """
    symbols, replace = point["symbols"], point["replace"]
    torch.manual_seed(point["seed"])
    random = torch.Generator().manual_seed(point["seed"])
    model = Retriever(symbols, point["features"], point["rule"])
    tanh = point["features"] == "tanh"
    training = build_for_training(
        model,
        lambda parameters: torch.optim.Adam(parameters, 1e-4 if tanh else 1e-3, fused=True),
        train=TrainConfig(precision="fp32", clip=0.0),
    )
    length = 2 * symbols if replace else symbols
    held_out = sample_pairs(
        symbols,
        symbols,
        _SEQUENCES,
        replace,
        # Another generator than that of training, so held-out sequences do not depend
        # on its length.
        torch.Generator().manual_seed(1_000_003 + point["seed"]),
    )
    curve: list[tuple[int, float | None]] = []
    best, diverged = (float("inf"), 0), False
    for step in range(1, point["steps"] + 1):
        keys, values = sample_pairs(symbols, length, 128 if tanh else 32, replace, random)
        queries = keys.gather(1, torch.randint(length, (len(keys), 1), generator=random))
        # A step whose gradient is not finite is skipped; here it counts as divergence.
        diverged |= training_step(training, [(keys, values, queries)], _mean_loss, step - 1).skipped
        if step % _EVAL_EVERY == 0:
            loss = math.nan if diverged else evaluate(model, *held_out)
            finite = math.isfinite(loss)
            curve.append((step, loss if finite else None))
            best = min(best, (loss, step)) if finite else best
            if best[0] < SOLVED or step - best[1] > _PATIENCE * _EVAL_EVERY or not finite:
                break
    return {"loss": best[0] if best[1] else None, "step": best[1], "curve": curve}


def _mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return loss_of(model(*batch), last_value(*batch))


@torch.no_grad()
def evaluate(model: Retriever, keys: Tensor, values: Tensor) -> float:
    """Return the loss over the keys that occur, as published at most 200 of each sequence."""
    total, count = 0.0, 0
    for row in range(len(keys)):
        queries = keys[row].unique()[None, :_MOST_QUERIES]
        one = keys[row : row + 1], values[row : row + 1]
        total += float(loss_of(model(*one, queries), last_value(*one, queries))) * queries.shape[1]
        count += queries.shape[1]
    return total / count
