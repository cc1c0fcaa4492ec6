"""The compiled product-key search, topk.cpp."""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memshard.models.kernels import cpu_rows

_SOURCE = Path(__file__).with_name("topk.cpp")
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: list[Any] = [
    _POINTER,
    _POINTER,
    *[_SIZE] * 4,
    _POINTER,
    _POINTER,
    _SIZE,
    _POINTER,
    _POINTER,
    ctypes.c_int,
]


@dataclass(frozen=True)
class CompiledSearch:
    """The loaded library."""

    library: ctypes.CDLL

    def __call__(
        self, first: Tensor, second: Tensor, pairs: tuple[Tensor, Tensor], k: int
    ) -> Tensor:
        """i1 and i2 of the k best, stacked: [2, ..., k] int32. first, second: [..., heads, keys]
        fp32 on the CPU. pairs: ranks of both halves that can be among the best, [pairs] int64
        each, in the order of ties.
        """
        shape, keys, (x, y) = first.shape[:-1], first.shape[-1], pairs
        halves = [scores.reshape(-1, shape[-1], keys) for scores in (first, second)]
        halves = [scores if scores.stride(-1) == 1 else scores.contiguous() for scores in halves]
        found = torch.empty(2, *shape, k, dtype=torch.int32)
        self.library.memshard_product_search(
            (_POINTER * 2)(*(scores.data_ptr() for scores in halves)),
            (_SIZE * 4)(*(n for scores in halves for n in scores.stride()[:2])),
            *halves[0].shape,
            k,
            x.data_ptr(),
            y.data_ptr(),
            len(x),
            found[0].data_ptr(),
            found[1].data_ptr(),
            torch.get_num_threads(),
        )
        return found


def build() -> CompiledSearch:
    """Raises as `cpu_rows.load`."""
    library = cpu_rows.load(_SOURCE)
    library.memshard_product_search.argtypes = _ARGUMENTS
    library.memshard_product_search.restype = None
    return CompiledSearch(library)
