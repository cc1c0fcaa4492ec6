"""Read the pieces of a checkpoint's tensors and compare them with their hashes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from memshard.io import named
from memshard.trainer.checkpoint.index import Chunk, StoredTensor


def read_pieces(
    folder: Path, name: str, chunk: Chunk, dtype: torch.dtype, wanted: range | None = None
) -> Iterator[tuple[range, Tensor]]:
    """Iterate over (rows, values) of the pieces of a chunk that have a wanted row (default: all);
    rows are counted within the chunk. ValueError if a piece does not match its hash.
    """
    _, row_bytes = chunk.rows(dtype.itemsize)
    path = folder / chunk.file
    with path.open("rb") as file:
        for rows, expected in zip(chunk.pieces(dtype.itemsize), chunk.sha256, strict=True):
            if wanted is not None and (rows.stop <= wanted.start or rows.start >= wanted.stop):
                continue
            file.seek(chunk.at + rows.start * row_bytes)
            # Writable, so torch.frombuffer below needs no copy.
            data = bytearray(len(rows) * row_bytes)
            with named(path):
                whole = file.readinto(data) == len(data)
            if not whole or hashlib.sha256(data).hexdigest() != expected:
                raise ValueError(
                    f"{name}: rows {rows.start} to {rows.stop - 1} in {chunk.file} do not match "
                    "their hash"
                )
            yield rows, torch.frombuffer(data, dtype=dtype).view(len(rows), *chunk.sizes[1:])


def verify(folder: Path, index: dict[str, StoredTensor]) -> None:
    """Read everything once. ValueError if a piece does not match its hash."""
    for name, tensor in index.items():
        for chunk in tensor.chunks:
            for _ in read_pieces(folder, name, chunk, tensor.dtype):
                pass
