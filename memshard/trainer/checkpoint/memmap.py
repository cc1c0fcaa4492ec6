"""Read a checkpoint's tensors through memory maps: what is not touched stays on disk."""

import math
from pathlib import Path

import torch
from torch import Tensor

from memshard.trainer.checkpoint.index import StoredTensor


class MappedTensor:
    """A tensor of a checkpoint. Values are not compared with hashes: `verify` does that."""

    def __init__(self, folder: Path, stored: StoredTensor) -> None:
        self.shape, self.dtype = stored.shape, stored.dtype
        self._parts: list[tuple[tuple[slice, ...], Tensor]] = []
        for chunk in stored.chunks:
            # from_file knows no offset, so a map begins at the file's start; bytes that nobody
            # reads cost nothing.
            size = math.prod(chunk.sizes) * stored.dtype.itemsize
            # torch names neither the file nor the reason as an OSError does.
            (folder / chunk.file).open("rb").close()
            # Private and never written, so its pages are those of the file.
            data = torch.from_file(
                str(folder / chunk.file), shared=False, size=chunk.at + size, dtype=torch.uint8
            )
            box = tuple(
                slice(first, first + length)
                for first, length in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            self._parts.append((box, data[chunk.at :].view(stored.dtype).view(chunk.sizes)))

    def whole(self) -> Tensor:
        """Return a copy in memory."""
        values = torch.empty(self.shape, dtype=self.dtype)
        for box, part in self._parts:
            values[box] = part
        return values

    def rows(self, rows: Tensor) -> Tensor:
        """Return some rows of a matrix, [n, dim]. rows: [n] int64."""
        if len(self._parts) == 1:
            return self._parts[0][1][rows]
        values = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        for box, part in self._parts:
            inside = ((rows >= box[0].start) & (rows < box[0].stop)).nonzero().flatten()
            values[inside, box[1]] = part[rows[inside] - box[0].start]
        return values
