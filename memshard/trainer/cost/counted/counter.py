"""Count what torch does in a pass over a model that is never allocated: operations of matrix
products and of attention, bytes that every other operation reads and writes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1)}
"""Where the factors are among the arguments."""
_READ_AGAIN = {"native_batch_norm": 1, "native_batch_norm_backward": 2}
"""How many of the first arguments kernels read a second time: for statistics, and to normalise."""
_ATTENTION = "_scaled_dot_product"
_MOVE_NOTHING = {"_unsafe_view", "_reshape_alias", "detach", "empty", "empty_like", "device"}


@dataclass
class Count:
    """Operations of products, and bytes read and written, each in a number of calls."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Count] = defaultdict(Count)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _MOVE_NOTHING:
            # By identity: what is changed in place, or comes twice, moves once.
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            count = self.counts[name]
            count.calls += 1
            count.bytes += sum(x.nbytes for x in tensors.values())
            count.bytes += sum(x.nbytes for x in args[: _READ_AGAIN.get(name, 0)])
            if name in _PRODUCTS:
                first, second = (args[place] for place in _PRODUCTS[name])
                count.flops += 2 * first.numel() * second.shape[-1]
            elif name.startswith(_ATTENTION):
                count.flops += _attention(args, backward="backward" in name)
        return out


def _attention(args: tuple[object, ...], backward: bool) -> float:
    """Return the operations of causal attention: two products of a forward pass over half of the
    pairs, five of its backward, which forms the scores again.
    """
    query, key = (x for x in args[backward : backward + 2] if isinstance(x, Tensor))
    batch, heads, length, width = query.shape
    return (5 if backward else 2) * batch * heads * length * key.shape[2] * width


def count_pass(loss: Callable[[], Tensor], dtype: torch.dtype) -> dict[str, Count]:
    """Return the counts of forward and backward of a loss by name of torch's operation, under
    autocast to `dtype`. Call it inside `unallocated`.
    """
    with _Counter() as counter:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total = loss()
        total.backward()
    return dict(counter.counts)


@contextmanager
def unallocated() -> Iterator[None]:
    """Let tensors made in the block have shapes and dtypes, and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
