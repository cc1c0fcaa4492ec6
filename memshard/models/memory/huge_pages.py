"""Large memory pages for large tables."""

import ctypes
import sys
from functools import cache

from torch import Tensor

from memshard.models.compat import is_traced

_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """Ask Linux to back a fresh CPU tensor by 2 MB pages; return the tensor.

    A row is about as large as a 4 KB page: with those each read of a row also misses the
    processor's table of page addresses (TLB).
    """
    if tensor.device.type != "cpu" or sys.platform != "linux" or is_traced(tensor):
        return tensor
    start, size = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    # Whole pages inside the tensor; madvise refuses an address within a page.
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    whole = (start + size - first) // _HUGE_PAGE * _HUGE_PAGE
    if whole > _HUGE_PAGE:
        # Advice: without permission or support nothing happens.
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), _MADV_HUGEPAGE)
    return tensor


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
