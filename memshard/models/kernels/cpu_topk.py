"""The product-key search of CPUs: topk.cpp, called through ctypes."""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memshard.models.kernels.compile_cpp import load_library
from memshard.models.kernels.plain_topk import candidate_pairs

_SOURCE = Path(__file__).with_name("topk.cpp")
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# fmt: off
_ARGUMENTS: list[Any] = [  # in the order of topk.cpp
    _POINTER, _POINTER, *[_SIZE] * 4, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _INT,
]
# fmt: on


@dataclass(frozen=True)
class CpuSearch:
    """The loaded library, as a function."""

    library: ctypes.CDLL

    def __call__(self, first: Tensor, second: Tensor, k: int) -> Tensor:
        """Do what `plain_topk.product_search` does.

        first, second: [..., heads, keys] fp32, on the CPU.
        """
        shape, keys, (x, y) = first.shape[:-1], first.shape[-1], candidate_pairs(k, first.device)
        halves = [scores.reshape(-1, shape[-1], keys) for scores in (first, second)]
        halves = [scores if scores.stride(-1) == 1 else scores.contiguous() for scores in halves]
        slots = torch.empty(2, *shape, k, dtype=torch.int32, device="cpu")
        self.library.memshard_product_search(
            (_POINTER * 2)(*(scores.data_ptr() for scores in halves)),
            (_SIZE * 4)(*(n for scores in halves for n in scores.stride()[:2])),
            *halves[0].shape,
            k,
            x.data_ptr(),
            y.data_ptr(),
            len(x),
            slots[0].data_ptr(),
            slots[1].data_ptr(),
            torch.get_num_threads(),
        )
        return slots


def build() -> CpuSearch:
    """Compile and load the search; raises as `load_library`."""
    library = load_library(_SOURCE)
    library.memshard_product_search.argtypes = _ARGUMENTS
    library.memshard_product_search.restype = None
    return CpuSearch(library)
