"""Mixer states that continue from step to step: one for each lane of a stream of text."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from memshard.models.mixers.mixer import MixerState
from memshard.models.transformer import Transformer
from memshard.parallel.mesh import DATA
from memshard.parallel.spec import ShardSpec
from memshard.trainer.checkpoint.global_tensors import global_tensor


class Carried:
    """The mixers' states of this rank's lanes, without gradient. They advance when a step is
    committed, so that a skipped step leaves no trace.

    lanes: rows of the global batch; a lane's sequence continues where its last one ended.
    continues: says which sample numbers do; the others begin with empty states. rank, ranks: which
    lanes are local, divided as by `rank_share`.
    """

    def __init__(
        self,
        model: Transformer,
        lanes: int,
        continues: Callable[[Tensor], Tensor],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        share = -(-lanes // ranks)
        self.lanes, self.first = lanes, min(rank * share, lanes)
        self.real = min(share, lanes - self.first)
        self._mixers = [block.mixer for block in model.blocks]
        self._continues = continues
        # Ranks with only filler rows also have states, which are never stored.
        # Capacity 0: these mixers' states have a constant size.
        self._states = model.init_states(share, 0)
        self._advanced: list[tuple[Tensor, Sequence[MixerState]]] = []

    def begin(self, samples: Tensor) -> list[Any]:
        """Return the states that the rows of a micro-batch continue from. samples: [rows], on the
        CPU; -1 for filler rows.
        """
        device = next(iter(state_tensors(self._states[0]).values())).device
        rows = self._rows(samples).to(device)
        fresh = (~self._continues(samples) | (samples < 0)).to(device)
        return [
            mixer.reset(mixer.reorder(state, rows), fresh)
            for mixer, state in zip(self._mixers, self._states, strict=True)
        ]

    def advance(self, samples: Tensor, states: Sequence[MixerState]) -> None:
        """Keep the states that those rows end with until the step is committed."""
        self._advanced.append((samples, states))

    @torch.no_grad()
    def commit(self) -> None:
        """Store the advanced states: the step is done."""
        for samples, states in self._advanced:
            real = samples >= 0
            for mine, new in zip(self._states, states, strict=True):
                for name, kept in state_tensors(mine).items():
                    # In place: checkpoints keep references to these tensors.
                    kept[self._rows(samples[real]).to(kept.device)] = state_tensors(new)[name][
                        real.to(kept.device)
                    ]
        self.discard()

    def discard(self) -> None:
        """Drop the advanced states: the step is skipped."""
        self._advanced.clear()

    def tensors(self, mesh: DeviceMesh | None) -> dict[str, Tensor]:
        """Return the states of all lanes for a checkpoint, as global tensors."""
        placement, tensors = ShardSpec(0, DATA, self.lanes), {}
        for layer, state in enumerate(self._states):
            for key, value in state_tensors(state).items():
                name = f"carried.blocks.{layer}.{key}"
                # By lane, so that a run on another number of ranks finds the states of its rows.
                tensors[name] = global_tensor(
                    name, value[: self.real], {} if mesh is None else {name: placement}, mesh
                )
        return tensors

    def _rows(self, samples: Tensor) -> Tensor:
        # Sample n continues lane n mod lanes. Filler rows read lane 0 and are reset.
        return torch.where(samples < 0, 0, samples % self.lanes - self.first)


def state_tensors(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a state, whose first dimension is rows, by name."""
    tensors: dict[str, Tensor] = {}
    for field in fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            tensors[prefix + field.name] = value
        elif is_dataclass(value):
            tensors |= state_tensors(value, f"{prefix}{field.name}.")
    return tensors
