"""The index of a checkpoint: where each piece of each tensor is. JSON, checked before use."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memshard.io import named, parse_json, read_small

INDEX_FILE = "index.json"
PIECE_BYTES = 1 << 24
"""Most bytes that are written, hashed and read at once."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
STORED_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_FLOATS, *_INTEGERS)}
_VERSION = 1
_DIMS = 64  # torch's own limit
_DATA_FILE = re.compile(r"rank\d{1,9}\.bin")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, as one rank wrote it: `sizes` values from `offsets` on, contiguous in
    `file` from byte `at` on. sha256: of each of its pieces.
    """

    file: str
    at: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    sha256: tuple[str, ...]

    def pieces(self, itemsize: int) -> list[range]:
        """Return the rows (of the first dim) of each piece; a box without dims is one row."""
        rows, row_bytes = self.rows(itemsize)
        # A row longer than 16 MB is one piece, since pieces are of whole rows.
        step = max(1, PIECE_BYTES // max(1, row_bytes))
        return (
            [range(first, min(first + step, rows)) for first in range(0, rows, step)]
            if row_bytes
            else []
        )

    def rows(self, itemsize: int) -> tuple[int, int]:
        """Return the number of rows, and the bytes of one."""
        return (
            (self.sizes[0], math.prod(self.sizes[1:]) * itemsize) if self.sizes else (1, itemsize)
        )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's global shape and its chunks, which cover it without overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def write_index(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Write the index, after the data files."""
    listed = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": tensor.shape,
            "chunks": [vars(chunk) for chunk in tensor.chunks],
        }
        for name, tensor in tensors.items()
    }
    # Not synced here: save_load.py flushes every file before it writes the marker.
    with named(folder / INDEX_FILE):
        (folder / INDEX_FILE).write_text(
            json.dumps({"version": _VERSION, "tensors": listed}), encoding="utf-8"
        )


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor by name. ValueError, with the reason, unless names of data files are
    plain, boxes are inside their tensors and cover them once, and their bytes
    are inside their files.
    """
    file = folder / INDEX_FILE
    try:
        content = parse_json(read_small(file))
    except FileNotFoundError:
        old = next(folder.glob("*.distcp"), None)
        raise ValueError(
            f"there is no {INDEX_FILE}"
            + (f", and pickled files such as {old.name} are never read" if old else "")
        ) from None
    except ValueError as error:
        raise ValueError(f"{INDEX_FILE} is not JSON: {error}") from error
    if (
        not isinstance(content, dict)
        or content.get("version") != _VERSION
        or not isinstance(content.get("tensors"), dict)
    ):
        raise ValueError(f"{INDEX_FILE} is not an index of version {_VERSION}")
    sizes = {path.name: path.stat().st_size for path in folder.glob("rank*.bin")}
    return {name: _tensor(name, entry, sizes) for name, entry in content["tensors"].items()}


def _tensor(name: str, entry: Any, file_sizes: dict[str, int]) -> StoredTensor:
    try:
        dtype = STORED_DTYPES[entry["dtype"]]
        shape = _numbers(entry["shape"])
        # Also of an empty tensor: torch counts all other dims before it allocates.
        if len(shape) > _DIMS or math.prod(max(1, size) for size in shape) >= 1 << 62:
            raise ValueError(f"{str(shape)[:60]} is no shape")
        chunks = tuple(
            Chunk(
                _text(c["file"]),
                _numbers([c["at"]])[0],
                _numbers(c["offsets"]),
                _numbers(c["sizes"]),
                tuple(map(_text, c["sha256"])),
            )
            for c in entry["chunks"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{INDEX_FILE}: the entry of {name} is malformed: {type(error).__name__} {error}"
        ) from None
    for chunk in chunks:
        rows, row_bytes = chunk.rows(dtype.itemsize)
        end = chunk.at + rows * row_bytes
        # Only names such as rank0.bin: "../x" or an absolute path would read
        # files outside the folder.
        if not _DATA_FILE.fullmatch(chunk.file):
            raise ValueError(
                f"{INDEX_FILE}: {name} is said to be in {chunk.file!r}, which is no data file of "
                "a checkpoint"
            )
        if end > file_sizes.get(chunk.file, -1):
            raise ValueError(
                f"{name} ends at byte {end:,} of {chunk.file}, which has "
                f"{file_sizes.get(chunk.file, 0):,}"
            )
        inside = len(chunk.offsets) == len(chunk.sizes) == len(shape)
        if not inside or any(
            o + s > whole for o, s, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        ):
            raise ValueError(
                f"{INDEX_FILE}: a piece of {name}, {chunk.sizes} from {chunk.offsets}, is not "
                f"inside its shape {shape}"
            )
        if len(chunk.sha256) != len(chunk.pieces(dtype.itemsize)):
            raise ValueError(
                f"{INDEX_FILE}: {name} has {len(chunk.sha256)} hashes for "
                f"{len(chunk.pieces(dtype.itemsize))} pieces"
            )
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    # Boxes that do not meet and together have as many values as the shape cover it exactly once.
    if sum(math.prod(chunk.sizes) for chunk in filled) != math.prod(shape) or _overlap(filled):
        raise ValueError(f"{INDEX_FILE}: the pieces of {name} do not cover its shape {shape} once")
    return StoredTensor(dtype, shape, tuple(filled))


def _overlap(chunks: list[Chunk]) -> bool:
    """Tell whether two boxes have a value in common."""
    if len(chunks) < 2:
        return False
    begins = np.array([chunk.offsets for chunk in chunks], dtype=np.int64)
    ends = begins + np.array([chunk.sizes for chunk in chunks], dtype=np.int64)
    # Sorted along the dim that most boxes are cut in, a box can meet only those that begin before
    # its end. A pair at a time, 40,000 chunks of a table took minutes; a tensor has one a rank.
    dim = max(range(begins.shape[1]), key=lambda dim: len(np.unique(begins[:, dim])))
    order = np.argsort(begins[:, dim], kind="stable")
    begins, ends = begins[order], ends[order]
    last = np.searchsorted(begins[:, dim], ends[:, dim])
    return any(
        np.all((begins[n + 1 : stop] < ends[n]) & (begins[n] < ends[n + 1 : stop]), axis=1).any()
        for n, stop in enumerate(last)
    )


def _numbers(values: Any) -> tuple[int, ...]:
    # `type(...) is int` refuses true and false, which Python also counts as integers.
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"{str(values)[:60]} are not sizes")
    return tuple(values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:60]} is not text")
    return value
