"""Linear attention as a fast weight memory (Schlag et al. 2021): each head has a matrix that keys
write to and queries read.

Its size does not depend on the length of the text, so generation needs constant memory.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from memshard.models.config import ModelConfig
from memshard.models.context import Context
from memshard.models.fast_weights.attention_norm import normalised_delta_rule, normalised_sum_rule
from memshard.models.fast_weights.delta_rule import delta_rule
from memshard.models.fast_weights.feature_maps import FeatureMap
from memshard.models.fast_weights.segments import (
    Neighbours,
    Rule,
    delta_rule_of_segment,
    sum_rule_of_segment,
)
from memshard.models.fast_weights.sum_rule import sum_rule
from memshard.models.layers.convolution import RecentRows
from memshard.models.layers.linear import Projection
from memshard.models.layers.position import rotate
from memshard.models.mixers.projections import HeadProjections

RuleKind = Literal["sum", "delta"]


@dataclass(frozen=True)
class _Writes:
    """The writes of the latest call, for `rollback`: the state before them, tensors [batch, heads,
    tokens, ...], documents [batch, tokens].
    """

    before: "FastWeightState"
    keys: Tensor
    values: Tensor
    strengths: Tensor
    documents: Tensor | None


@dataclass(frozen=True)
class FastWeightState:
    """The state of linear attention.

    memory: [batch, heads, features, head dim] fp32, one column more with attention normalisation;
    documents: [batch] int64, that of the last token, -1 for none; length: tokens seen; recent:
    state of the convolutions, if any.
    """

    memory: Tensor
    documents: Tensor
    length: int = 0
    latest: _Writes | None = None
    recent: RecentRows | None = None


class FastWeightMixer(HeadProjections):
    """Causal linear attention by the sum rule or the delta rule.

    features: of keys and queries. attention_norm: divide what is read by the sum over all keys
    written. rotary: rotate queries and keys by their positions before the feature map. parts:
    arguments of `HeadProjections`, except kv_heads.
    """

    column_parallel = (*HeadProjections.column_parallel, "strength")

    def __init__(
        self,
        dim: int,
        heads: int,
        rule: RuleKind,
        features: FeatureMap,
        attention_norm: bool = False,
        rotary: bool = False,
        output_scale: float = 1.0,
        **parts: Any,
    ) -> None:
        super().__init__(dim, heads, output_scale, **parts)
        self.rule, self.features, self.attention_norm, self.rotary = (
            rule,
            features,
            attention_norm,
            rotary,
        )
        self.strength = Projection(dim, heads) if rule == "delta" else None
        self.neighbours: Neighbours | None = None
        """Set by `share_sequence`."""

    @classmethod
    def from_config(cls, config: ModelConfig, layer: int, output_scale: float) -> Self:
        """Return a layer's mixer: of kind delta by the delta rule, otherwise by the sum rule."""
        settings = config.mixer
        rule: RuleKind = "delta" if settings.kind_of(layer).name == "delta" else "sum"
        # As published: linear attention divides by its sum, the delta rule needs keys that add up
        # to 1.
        feature_norm = settings.feature_norm or ("sum" if rule == "delta" else "none")
        attention_norm = settings.attention_norm
        return cls(
            config.dim,
            settings.heads,
            rule,
            FeatureMap(
                settings.features,
                config.dim // settings.heads,
                settings.feature_width,
                feature_norm,
            ),
            rule == "sum" if attention_norm is None else attention_norm,
            rotary=config.position == "rotary",
            output_scale=output_scale,
            convolution=settings.convolution,
            share_qk=settings.share_qk,
        )

    def forward(
        self, x: Tensor, ctx: Context, state: FastWeightState | None = None
    ) -> tuple[Tensor, FastWeightState | None]:
        """Return [batch, length, dim] and, where a state was given, the advanced one."""
        q, k, v, recent = self.project(x, ctx, state.recent if state else None)
        if self.rotary:
            q, k = rotate(q, ctx.positions), rotate(k, ctx.positions)
        q, k = self.features(torch.stack((q, k))).unbind()
        beta = (
            # The sum rule knows no strength; ones let both rules share padding and rollback.
            torch.ones_like(k[..., 0])
            if self.strength is None
            else self.strength(x).mT.sigmoid().to(k.dtype)
        )
        if ctx.padding is not None:
            # Padding writes nothing.
            k, beta = k * ctx.padding[:, None, :, None], beta * ctx.padding[:, None]
        y, memory = self._read(q, k, v, beta, state, ctx.documents)
        if state is not None:
            # Training never rolls back, and with gradients `latest` would keep the whole graph.
            latest = (
                None
                if torch.is_grad_enabled()
                else _Writes(replace(state, latest=None), k, v, beta, ctx.documents)
            )
            documents = state.documents if ctx.documents is None else ctx.documents[:, -1]
            state = FastWeightState(memory, documents, state.length + x.shape[1], latest, recent)
        return self.output(y.transpose(1, 2).flatten(2)), state

    def init_state(self, batch: int, capacity: int) -> FastWeightState:
        """Return an empty state for `batch` rows of any length; `capacity` does not matter."""
        weight = self.value.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # One column more for the sum of keys.
        width = weight.shape[0] // self.heads + self.attention_norm
        memory = weight.new_zeros(batch, self.heads, self.features.features, width, dtype=dtype)
        return FastWeightState(
            memory,
            torch.full((batch,), -1, device=weight.device),
            recent=self.convolutions.nothing_recent(batch),
        )

    @staticmethod
    def reorder(state: FastWeightState, rows: Tensor) -> FastWeightState:
        """Return the state whose row i is row rows[i] of this one. rows: [new batch] int64."""
        recent = state.recent and state.recent.reorder(rows)
        return FastWeightState(
            state.memory[rows], state.documents[rows], state.length, recent=recent
        )

    def rollback(self, state: FastWeightState, tokens: int) -> FastWeightState:
        """Return the state before its last `tokens` tokens. ValueError beyond the tokens of the
        latest call: what they overwrote is gone.
        """
        latest = state.latest
        if latest is None or tokens > latest.keys.shape[2]:
            raise ValueError(
                f"fast weights forget what they overwrote: {tokens} tokens are not in their "
                "latest call, or that had gradients: "
                "keep the earlier state"
            )
        kept = latest.keys.shape[2] - tokens
        if not kept:
            return latest.before
        k, v, beta = (x[:, :, :kept] for x in (latest.keys, latest.values, latest.strengths))
        documents = None if latest.documents is None else latest.documents[:, :kept]
        # Subtracting the writes would leave rounding errors, so those that stay are written again.
        _, memory = self._read(k, k, v, beta, latest.before, documents)
        last = state.documents if documents is None else documents[:, -1]
        return FastWeightState(
            memory,
            last,
            state.length - tokens,
            recent=state.recent and state.recent.rollback(tokens),
        )

    @staticmethod
    def reset(state: FastWeightState, rows: Tensor) -> FastWeightState:
        """Forget everything in the given rows (a document ended there). rows: [batch] bool."""
        recent = state.recent and state.recent.reset(rows)
        return FastWeightState(
            state.memory * ~rows[:, None, None, None], state.documents, state.length, recent=recent
        )

    def share_sequence(self, neighbours: Neighbours) -> None:
        """Exchange states with the ranks that have the sequence's other segments; see `Mixer`."""
        self.neighbours = self.convolutions.neighbours = neighbours

    def kernel_choice(self, device: torch.device, dtype: torch.dtype) -> tuple[str, str] | None:
        """Return what computes the delta rule, and why; see `Mixer`."""
        if self.rule != "delta":
            return None
        # Not at the top, because exported models come without kernels to choose from.
        from memshard.models.kernels.fla_delta_rule import choose_kernel

        features = self.features
        _, reason = choose_kernel(device, dtype, features.features, features.dim, delta_rule)
        return "delta rule", reason

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        state: FastWeightState | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        memory, before = (None, None) if state is None else (state.memory, state.documents)
        delta: Rule = delta_rule
        sums: Rule = sum_rule
        if self.neighbours is not None:
            delta, sums = (
                delta_rule_of_segment(self.neighbours),
                sum_rule_of_segment(self.neighbours),
            )
            before = None if documents is None else self.neighbours.rows_before(documents, 1)[:, 0]
        resets = None if documents is None else _resets(documents, before)
        if self.rule == "delta" and self.attention_norm:
            return normalised_delta_rule(q, k, v, beta, memory, resets, delta=delta, sums=sums)
        if self.rule == "delta":
            return delta(q, k, v, beta, memory, resets=resets)
        if self.attention_norm:
            return normalised_sum_rule(q, k, v, memory, resets, sums=sums)
        return sums(q, k, v, memory, resets=resets)


def _resets(documents: Tensor, before: Tensor | None) -> Tensor:
    """Return where a document begins, [batch, length] bool. before: [batch], the document of the
    token before the first one, -1 if there was none.
    """
    before = documents[:, :1] if before is None else before[:, None]
    changed = torch.cat((before, documents[:, :-1]), 1) != documents
    # A new state is empty: there is nothing to forget.
    changed[:, 0] &= before[:, 0] >= 0
    return changed
