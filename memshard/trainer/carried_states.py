"""Mixer states that continue from step to step: one for each lane of a stream of text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from memshard.data_pipeline.stream.rank_share import deal_rows
from memshard.models.mixers.mixer import MixerState
from memshard.models.transformer import Transformer
from memshard.parallel import compat
from memshard.parallel.mesh import DATA, group
from memshard.parallel.spec import ShardSpec
from memshard.trainer.checkpoint.global_tensors import global_tensor
from memshard.trainer.tasks.to_device import to_device


class Carried:
    """The mixers' states of this rank's lanes, without gradient. They advance when a step is
    committed, so that a skipped step leaves no trace.

    lanes: rows of the global batch; a lane's sequence continues where its last one ended.
    continues: says which sample numbers do; the others begin with empty states. rank, ranks,
    micro_batch: which lanes are local, see `deal_rows`.
    """

    def __init__(
        self,
        model: Transformer,
        lanes: int,
        continues: Callable[[Tensor], Tensor],
        rank: int = 0,
        ranks: int = 1,
        micro_batch: int | None = None,
    ) -> None:
        self.lanes, self.rank, self.share = lanes, rank, -(-lanes // ranks)
        # The lanes of every rank, in the order of its states; filler comes after them.
        self._dealt = [
            [lane for part in deal_rows(lanes, other, ranks, micro_batch) for lane in part.rows]
            for other in range(ranks)
        ]
        self._place = torch.zeros(lanes, dtype=torch.int64)
        self._place[self._dealt[rank]] = torch.arange(len(self._dealt[rank]))
        self._model = model
        self._continues = continues
        # Ranks with only filler rows also have states, which are never stored.
        # Capacity 0: these mixers' states have a constant size.
        self._states = model.init_states(self.share, 0)
        self._device = next(iter(state_tensors(self._states[0]).values())).device
        self._advanced: list[tuple[Tensor, Sequence[MixerState]]] = []

    def begin(self, samples: Tensor) -> list[Any]:
        """Return the states that the rows of a micro-batch continue from. samples: [rows], on the
        CPU; -1 for filler rows.
        """
        fresh = ~self._continues(samples) | (samples < 0)
        rows, fresh = to_device(self._device, self._rows(samples), fresh)
        return self._model.reset(self._model.reorder(self._states, rows), fresh)

    def advance(self, samples: Tensor, states: Sequence[MixerState]) -> None:
        """Keep the states that those rows end with until the step is committed."""
        self._advanced.append((samples, states))

    @torch.no_grad()
    def commit(self) -> None:
        """Store the advanced states: the step is done."""
        for samples, states in self._advanced:
            # Places and not masks, whose number a GPU would be asked for.
            real = (samples >= 0).nonzero().squeeze(1)
            rows, real = to_device(self._device, self._rows(samples[real]), real)
            for mine, new in zip(self._states, states, strict=True):
                for name, kept in state_tensors(mine).items():
                    # In place: checkpoints keep references to these tensors.
                    kept[rows] = state_tensors(new)[name][real]
        self.discard()

    def discard(self) -> None:
        """Drop the advanced states: the step is skipped."""
        self._advanced.clear()

    def tensors(self, mesh: DeviceMesh | None) -> dict[str, Tensor]:
        """Return the states of all lanes for a checkpoint, as global tensors. All ranks call it.

        They are by lane, so that a run on another number of ranks finds the states of its rows.
        Where they do not share memory with the run, `restore` takes them over.
        """
        first = min(self.rank * self.share, self.lanes)
        block = slice(first, min(first + self.share, self.lanes))
        placement, tensors = ShardSpec(0, DATA, self.lanes), {}
        for name, value in self._named():
            if mesh is None:
                tensors[name] = value
            else:
                local = _by_lane(value, self._dealt, mesh)[block]
                tensors[name] = global_tensor(name, local, {name: placement}, mesh)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], mesh: DeviceMesh | None) -> None:
        """Take over the tensors of `tensors` that a checkpoint was loaded into. All ranks call
        it.
        """
        if mesh is None:
            return
        ranks = len(self._dealt)
        blocks = [
            [*range(self.lanes)[rank * self.share : (rank + 1) * self.share]]
            for rank in range(ranks)
        ]
        for name, value in self._named():
            loaded = tensors[name]
            assert isinstance(loaded, DTensor)
            local = value.new_zeros(value.shape)
            local[: len(blocks[self.rank])] = loaded.to_local()
            lanes = self._dealt[self.rank]
            value[: len(lanes)] = _by_lane(local, blocks, mesh)[lanes]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for layer, state in enumerate(self._states):
            for key, value in state_tensors(state).items():
                yield f"carried.blocks.{layer}.{key}", value

    def _rows(self, samples: Tensor) -> Tensor:
        # Sample n continues lane n mod lanes. Filler rows read any state and are reset.
        return self._place[samples % self.lanes]


def _by_lane(local: Tensor, dealt: Sequence[Sequence[int]], mesh: DeviceMesh) -> Tensor:
    """Return the states of all lanes in order. local: this rank's, [share, ...]; dealt: the lanes
    of every rank, in the order of its states.
    """
    everywhere = local.new_empty(len(dealt) * len(local), *local.shape[1:])
    compat.all_gather_single(everywhere, local.contiguous(), group(mesh, DATA))
    places = torch.empty(sum(map(len, dealt)), dtype=torch.int64)
    for rank, lanes in enumerate(dealt):
        places[lanes] = rank * len(local) + torch.arange(len(lanes))
    return everywhere[places.to(local.device)]


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
