"""Storage for torch's distributed checkpoint (DCP): raw bytes in one file a rank, and a JSON index.

DCP plans which rank writes and reads what, for any layout. Its own storage pickles the index, and
unpickling runs whatever code the file contains; its safetensors storage builds each file in memory.
"""

import hashlib
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from memshard.io import named, sync
from memshard.trainer.checkpoint.hashed_pieces import read_pieces
from memshard.trainer.checkpoint.index import Chunk, StoredTensor, write_index

# Memory maps view a chunk in its dtype, which needs an aligned address; 64 is a cache line.
_ALIGNMENT = 64


class PieceWriter(StorageWriter):
    """Writes each tensor in pieces of at most 16 MB; every file reaches the disk before `finish`.

    in_place: names of tensors to write first, without a copy. Then this rank's part of the others
    is copied to host memory and `free` is called: from then on all tensors may change.
    """

    def __init__(
        self, folder: Path, in_place: Collection[str] = (), free: Callable[[], None] = lambda: None
    ) -> None:
        self.folder = folder
        self.in_place = frozenset(in_place)
        self.free = free
        self.rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """DCP calls it before each save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take this rank's number from DCP."""
        self.rank = kwargs.get("rank", 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is: there is nothing to prepare."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans as they are: there is nothing to prepare."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part of the tensors."""
        name = f"rank{self.rank}.bin"
        in_place = [item for item in plan.items if item.index.fqn in self.in_place]
        others = [item for item in plan.items if item.index.fqn not in self.in_place]
        path = self.folder / name
        with named(path), path.open("wb") as file:
            results = [_write(file, name, item, _local(item, planner)) for item in in_place]
            # Dense parameters and moments are small next to the tables and copied, so that training
            # goes on while they are written.
            copies = [_local(item, planner).to("cpu", copy=True) for item in others]
            self.free()
            results += [
                _write(file, name, item, copy) for item, copy in zip(others, copies, strict=True)
            ]
            # The commit marker must not reach the disk before the data it vouches for.
            file.flush()
            sync(file.fileno())
        # Already done: the whole save runs on a thread (background.py), so writing here may block.
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; DCP calls it on rank 0."""
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        for result in chain.from_iterable(results):
            chunks[result.index.fqn].append(result.storage_data)
        stored = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), name
            stored[name] = StoredTensor(
                entry.properties.dtype, tuple(entry.size), tuple(chunks[name])
            )
        write_index(self.folder, stored)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: DCP asks only when it has to choose a storage."""
        return False


def _local(item: WriteItem, planner: SavePlanner) -> Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def _write(file: BinaryIO, name: str, item: WriteItem, tensor: Tensor) -> WriteResult:
    assert item.tensor_data is not None
    # Zeros up to the next multiple of 64.
    file.write(bytes(-file.tell() % _ALIGNMENT))
    box = item.tensor_data.chunk
    chunk = Chunk(name, file.tell(), tuple(box.offsets), tuple(box.sizes), ())
    rows = tensor if tensor.ndim else tensor.reshape(1)
    hashes = []
    # Piece by piece, so that a table on a GPU needs 16 MB of host memory, not its size.
    for piece in chunk.pieces(tensor.itemsize):
        data = (
            rows[piece.start : piece.stop]
            .contiguous()
            .cpu()
            .view(-1)
            .view(torch.uint8)
            .numpy()
            .data
        )
        file.write(data)
        hashes.append(hashlib.sha256(data).hexdigest())
    return WriteResult(item.index, file.tell() - chunk.at, replace(chunk, sha256=tuple(hashes)))


class PieceReader(StorageReader):
    """Reads a checkpoint's tensors. ValueError, with the reason, if a piece misses its hash."""

    def __init__(self, folder: Path, index: dict[str, StoredTensor]) -> None:
        self.folder = folder
        self.index = index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """DCP calls it before each load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index in DCP's form."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(tensor.dtype),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                        for chunk in tensor.chunks
                    ],
                )
                for name, tensor in self.index.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: there is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is: there is nothing to prepare."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are: there is nothing to prepare."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's tensors."""
        for item in plan.items:
            name, offsets = item.storage_index.fqn, item.storage_index.offset
            chunk = self._chunks[name, tuple(offsets or ())]
            target = planner.resolve_tensor(item).detach()
            self._fill(name, chunk, target, tuple(item.storage_offsets), tuple(item.lengths))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: DCP asks only when it has to choose a storage."""
        return False

    @cached_property
    def _chunks(self) -> dict[tuple[str, tuple[int, ...]], Chunk]:
        return {
            (name, chunk.offsets): chunk
            for name, tensor in self.index.items()
            for chunk in tensor.chunks
        }

    def _fill(
        self,
        name: str,
        chunk: Chunk,
        target: Tensor,
        begins: tuple[int, ...],
        lengths: tuple[int, ...],
    ) -> None:
        """Copy the box of size `lengths` at `begins`, counted in the chunk, into target."""
        dtype = self.index[name].dtype
        if not chunk.sizes:
            # A number without dims, such as a step count, is stored as one row.
            target.copy_(next(read_pieces(self.folder, name, chunk, dtype))[1][0])
            return
        first, last = begins[0], begins[0] + lengths[0]
        for rows, piece in read_pieces(self.folder, name, chunk, dtype, range(first, last)):
            # Pieces cut the first dim only; in the others a layout with split columns wants a part.
            low, high = max(first, rows.start), min(last, rows.stop)
            part = piece[low - rows.start : high - rows.start]
            for dim in range(1, part.ndim):
                part = part.narrow(dim, begins[dim], lengths[dim])
            target[low - first : high - first].copy_(part)
