"""Banded attention on CPUs: banded.cpp, called through ctypes.

It computes only the pairs that see each other; the tiles of plain torch compute twice as many.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from memshard.models.kernels.backend import SWITCH
from memshard.models.kernels.compile_cpp import CompileError, load_library
from memshard.models.lsh.bucket_order import Order
from memshard.variables import switch

_SOURCE = Path(__file__).with_name("banded.cpp")
_INPUTS, _OUTPUTS = ("q", "k", "v", "d_out"), ("out", "logs", "d_q", "d_k", "d_v")
_SIZES = ("rows", "length", "dim", "width", "rounds", "window", "chunk")


class _Banded(ctypes.Structure):
    """The arguments, in the order of banded.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_INPUTS, "places", "groups", "codes", *_OUTPUTS)),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in ("itself", "threads")),
    ]


@cache
def kernel() -> ctypes.CDLL | None:
    """Return the library, compiled at the first call; None without a compiler, or if
    MEMSHARD_KERNELS is plain.
    """
    if switch(SWITCH, "plain"):
        return None
    try:
        return load_library(_SOURCE)
    except CompileError:
        return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, orders: list[Order], window: int, chunk: int, itself: bool
) -> tuple[Tensor, Tensor]:
    """Do what `banded._forward` does. Tensors in fp32, fp16 or bf16, on the CPU; fp32 inside."""
    # In fp32 whatever v is: the kernel writes to them directly.
    out, logs = torch.empty(v.shape), torch.empty(v.shape[:2])
    _call(
        "memshard_banded_forward",
        {"q": q, "k": k, "v": v, "out": out, "logs": logs},
        orders,
        window,
        chunk,
        itself,
    )
    return out.to(v.dtype), logs


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: list[Order],
    out: Tensor,
    logs: Tensor,
    d_out: Tensor,
    window: int,
    chunk: int,
    itself: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `banded._backward` does."""
    # fp32 and zero: the kernel adds one contribution a round.
    d_q, d_k, d_v = (torch.zeros(x.shape) for x in (q, k, v))
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "logs": logs,
        "d_out": d_out,
        "d_q": d_q,
        "d_k": d_k,
        "d_v": d_v,
    }
    _call("memshard_banded_backward", tensors, orders, window, chunk, itself)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def _call(
    name: str,
    tensors: dict[str, Tensor],
    orders: list[Order],
    window: int,
    chunk: int,
    itself: bool,
) -> None:
    library = kernel()
    assert library is not None
    # Named until the call is over: a temporary's memory could be given away before.
    # Results pass through here as well. They are fp32 and contiguous, so they are not copied; a
    # copy would be filled instead of the tensor that the caller returns.
    inputs = {key: tensor.float().contiguous() for key, tensor in tensors.items()}
    rows, length, dim = tensors["q"].shape
    sizes = rows, length, dim, tensors["v"].shape[-1], len(orders), window, chunk
    # One pointer for each round's order.
    lists = {
        field: (ctypes.c_void_p * len(orders))(
            *(getattr(order, field).data_ptr() for order in orders)
        )
        for field in ("places", "groups", "codes")
    }
    arguments = _Banded(
        itself=itself, threads=torch.get_num_threads(), **dict(zip(_SIZES, sizes, strict=True))
    )
    for field, tensor in inputs.items():
        setattr(arguments, field, tensor.data_ptr())
    for field, pointers in lists.items():
        setattr(arguments, field, ctypes.addressof(pointers))
    getattr(library, name)(ctypes.byref(arguments))
