"""Write safetensors files block by block, so that no tensor is ever whole in memory.

A file has 8 bytes with the length of its header, the header (JSON: name, dtype, shape and position
of every tensor), and then the values.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memshard.io import named, sync

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Entry:
    """A tensor to write. blocks: its values in order, in blocks of any size."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Iterable[Tensor]


def write_safetensors(file: Path, entries: list[Entry]) -> str:
    """Write the file, flush it to disk, and return its SHA-256."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        size = math.prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)  # so that values begin at a multiple of 8 bytes
    digest = hashlib.sha256()
    with named(file), file.open("wb") as out:
        start_of_file = len(text).to_bytes(8, "little") + text
        out.write(start_of_file)
        digest.update(start_of_file)
        for entry in entries:
            start = out.tell()
            for data in _bytes(entry):
                out.write(data)
                digest.update(data)
            # Offsets were promised in the header before the values were known.
            assert out.tell() - start == math.prod(entry.shape) * entry.dtype.itemsize, entry.name
        out.flush()
        sync(out.fileno())
    return digest.hexdigest()


def _bytes(entry: Entry) -> Iterator[memoryview]:
    for block in entry.blocks:
        assert block.dtype == entry.dtype, entry.name
        yield block.contiguous().view(-1).view(torch.uint8).numpy().data
