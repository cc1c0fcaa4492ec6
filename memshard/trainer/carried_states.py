"""Fast weights that go on from step to step: what each lane of a stream of text remembers."""

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
    """The mixers' states of this rank's lanes, without gradient. They move when a step is done: one
    that is skipped leaves no trace.

    lanes: rows of the global batch; the sequence of a lane goes on where the one a step before
    ended. continues: of sample numbers, whether they do; the others begin with nothing. rank,
    ranks: which share of the lanes is here, cut as `rank_share` does.
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
        # A share of filler rows alone has states, too, which nobody keeps.
        self._states = model.init_states(share, 0)
        self._advanced: list[tuple[Tensor, Sequence[MixerState]]] = []

    def begin(self, samples: Tensor) -> list[Any]:
        """The states that the rows of a micro-batch go on from. samples: [rows], on the CPU; -1 for
        filler rows.
        """
        device = next(iter(state_tensors(self._states[0]).values())).device
        rows = self._rows(samples).to(device)
        fresh = (~self._continues(samples) | (samples < 0)).to(device)
        return [
            mixer.reset(mixer.reorder(state, rows), fresh)
            for mixer, state in zip(self._mixers, self._states, strict=True)
        ]

    def advance(self, samples: Tensor, states: Sequence[MixerState]) -> None:
        """What those rows go on to, once the step is done."""
        self._advanced.append((samples, states))

    @torch.no_grad()
    def commit(self) -> None:
        """The step is done."""
        for samples, states in self._advanced:
            real = samples >= 0
            for mine, new in zip(self._states, states, strict=True):
                for name, kept in state_tensors(mine).items():
                    kept[self._rows(samples[real]).to(kept.device)] = state_tensors(new)[name][
                        real.to(kept.device)
                    ]
        self.discard()

    def discard(self) -> None:
        """The step is skipped."""
        self._advanced.clear()

    def tensors(self, mesh: DeviceMesh | None) -> dict[str, Tensor]:
        """For checkpoints: of all lanes, split over the ranks where there are several."""
        placement, found = ShardSpec(0, DATA, self.lanes), {}
        for layer, state in enumerate(self._states):
            for key, value in state_tensors(state).items():
                name = f"carried.blocks.{layer}.{key}"
                found[name] = global_tensor(
                    name, value[: self.real], {} if mesh is None else {name: placement}, mesh
                )
        return found

    def _rows(self, samples: Tensor) -> Tensor:
        return torch.where(samples < 0, 0, samples % self.lanes - self.first)


def state_tensors(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """What a state holds of every row, by name."""
    found: dict[str, Tensor] = {}
    for field in fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            found[prefix + field.name] = value
        elif is_dataclass(value):
            found |= state_tensors(value, f"{prefix}{field.name}.")
    return found
