"""The mode in which CUDA tensors are fakes, and everything done to them is counted."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

PACKAGE = f"{Path(__file__).parents[2] / 'memshard'}/"
CUDA = torch.device("cuda", 0)
_SIZED_BY_VALUES = {
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "bincount",
    "equal",
}
"""Operations that wait for the device, because the shape of their result depends on values."""
_NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_"}
_NO_LAUNCH |= {"lift_fresh", "resize_", "detach", "alias", "_unsafe_view", "_reshape_alias"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


@dataclass
class Counts:
    """What was asked of the device, each as (what, line of memshard): how often.

    launches: kernels; `autograd` is the place of torch's own backwards. waits: times the host
    waited for a value or a shape, one for each `tolist`. blocking: copies between host and device
    that wait; copies: those that do not. exchanges: collectives, with the devices of their tensors.
    largest: bytes of the largest tensor made.
    """

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    blocking: Counter[tuple[str, str]] = field(default_factory=Counter)
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    exchanges: Counter[tuple[str, str]] = field(default_factory=Counter)
    largest: int = 0

    def __str__(self) -> str:
        lines = []
        for name in ("waits", "blocking", "copies", "exchanges", "launches"):
            counter: Counter[tuple[str, str]] = getattr(self, name)
            lines.append(f"{name}: {counter.total()}")
            if name != "launches":
                lines += [
                    f"    {n} x {what}  {place}" for (what, place), n in counter.most_common()
                ]
        return "\n".join(lines)


def values_of(x: Tensor) -> Tensor | None:
    """Return the numbers of a tensor, in host memory, any for one on the meta device; None for a
    fake without them.
    """
    if isinstance(x, FakeTensor):
        return getattr(x, "known_values", None)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if x.is_meta else x


class Watch(TorchDispatchMode):
    """Runs operations on CUDA tensors: shapes, dtypes and devices as FakeTensorMode has them, and
    the numbers of tensors of at most `computed` elements on the CPU.

    Where numbers are unknown, small results are assumed to be 1, True for `all` and `isfinite`, and
    False for other questions; shapes are assumed to be the largest possible.
    """

    def __init__(self, computed: int) -> None:
        super().__init__()
        self.computed = computed
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True, static_shapes=True)
        self.open: list[Counts] = []

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """Count what is done inside."""
        counts = Counts()
        self.open.append(counts)
        try:
            yield counts
        finally:
            self.open.remove(counts)

    def count(self, kind: str, what: str) -> None:
        """Add one to a counter."""
        if self.open:
            key = what, memshard_line()
            for counts in self.open:
                getattr(counts, kind)[key] += 1

    def fake(self, values: Tensor, known: bool = True) -> FakeTensor:
        """Return a fake CUDA tensor, of the shape of values and with these, if they are known."""
        fake = self._fake(values, CUDA)
        fake.known_values = values if known else None
        return fake

    def _fake(self, x: Tensor, device: torch.device) -> FakeTensor:
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return FakeTensor(self.fakes, meta, device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        leaves, spec = tree_flatten((args, kwargs or {}))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if func.namespace == "c10d":
            return self._exchange(func, leaves, spec)
        device = (kwargs or {}).get("device")
        made_on_cuda = device is not None and torch.device(device).type == "cuda"
        if not made_on_cuda and not any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name == "device":
            return func(*args)
        if name == "record_stream":
            return None
        known = not any(isinstance(x, FakeTensor) and values_of(x) is None for x in tensors)
        self._count_waits(name, args, kwargs or {})
        if name == "_local_scalar_dense":
            return values_of(args[0]).item() if known else assumed(name, args[0]).item()
        to_host = name == "_to_copy" and device is not None and torch.device(device).type == "cpu"
        small = known and max((x.numel() for x in tensors), default=0) <= self.computed
        if (
            name in _SIZED_BY_VALUES
            or (name in _INDEXING and _masks(args))
            or _unsized_repeat(name, kwargs)
        ):
            result = self._compute(func, leaves, spec) if known else _largest(name, args, kwargs)
            out = (
                args[0]
                if func._schema.is_mutable
                else tree_map(lambda x: self.fake(x, known) if isinstance(x, Tensor) else x, result)
            )
            self._count_launch(func, name, out)
            return out
        out = result = None
        if not to_host:
            with self.fakes:
                faked = [self._fake(x, x.device) if _real(x) else x for x in leaves]
                for x in faked:
                    if isinstance(x, FakeTensor):
                        x.constant = None  # or FakeTensorMode would compute with it
                fake_args, fake_kwargs = tree_unflatten(faked, spec)
                fake_kwargs.pop("pin_memory", None)
                out = func(*fake_args, **fake_kwargs)
            small = small and _elements(out) <= self.computed
        computed = small or (known and to_host)
        result = self._compute(func, leaves, spec) if computed else None
        if to_host:
            # Real, whatever it holds.
            return result if computed else assumed(name, args[0])
        if func._schema.is_mutable and not isinstance(out, Tensor):
            # A foreach or fused operation, which has written what it was given.
            for x in tensors:
                if not computed and isinstance(x, FakeTensor):
                    x.known_values = None
        elif func._schema.is_mutable and _real(args[0]):
            out = args[0]
        else:
            out = self._with_values(func, name, out, result if computed else out)
        self._count_launch(func, name, out)
        return out

    def _exchange(self, func: Any, leaves: list[Any], spec: Any) -> Any:
        """Let a group of fake ranks do on the CPU what it does; torch ignores what is returned, but
        for whether it is over.
        """
        devices = {x.device.type for x in leaves if isinstance(x, Tensor)}
        self.count("exchanges", " ".join((func._schema.name, *sorted(devices))))
        for number, x in enumerate(leaves):
            if isinstance(x, FakeTensor):
                values = values_of(x)
                leaves[number] = torch.zeros(x.shape) if values is None else values
        args, kwargs = tree_unflatten(leaves, spec)
        return func(*args, **kwargs)

    def _compute(self, func: Any, leaves: list[Any], spec: Any) -> Any:
        """Run an operation on the numbers of its arguments, on the CPU."""
        args, kwargs = tree_unflatten(
            [values_of(x) if isinstance(x, Tensor) else x for x in leaves], spec
        )
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)

    def _with_values(self, func: Any, name: str, out: Any, result: Any) -> Any:
        """Keep the computed numbers with the fakes; a result that is `out` again has none."""
        fakes, spec = tree_flatten(out)
        for number, (x, values) in enumerate(zip(fakes, tree_flatten(result)[0], strict=True)):
            if not isinstance(x, FakeTensor):
                continue
            if values is x:
                few = x.numel() <= 16 and not func.is_view
                values = assumed(name, x) if few or x.device.type == "cpu" else None
            if x.device.type == "cpu":
                fakes[number] = values
            else:
                x.known_values = values
        return tree_unflatten(fakes, spec)

    def _count_waits(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if (
            name == "_local_scalar_dense"
            or name in _SIZED_BY_VALUES
            or _unsized_repeat(name, kwargs)
        ):
            self.count("waits", name)
        elif name in _INDEXING:
            # Writing one number where a mask is set needs no shape.
            if _masks(args) and (name in ("index", "_unsafe_index") or args[2].numel() > 1):
                self.count("waits", "boolean indexing")
            if any(_real(x) for x in args[1]):
                self.count("blocking", "cpu->cuda of indices")
        elif name in ("_to_copy", "copy_"):
            self._count_copy(name, args, kwargs)

    def _count_copy(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name == "copy_":
            to, source = args[0], args[1]
            target, ahead = to.device, len(args) > 2 and args[2]
        else:
            to, source = None, args[0]
            target = torch.device(kwargs.get("device") or source.device)
            ahead = kwargs.get("non_blocking", False)
        if {source.device.type, target.type} != {"cpu", "cuda"}:
            return
        # A copy of pageable memory waits until all of it is staged.
        host = source if source.device.type == "cpu" else to
        free = ahead and (host is None or host.is_pinned())
        what = f"{source.device.type}->{target.type} {str(source.dtype)[6:]}"
        self.count("copies" if free else "blocking", what)

    def _count_launch(self, func: Any, name: str, out: Any) -> None:
        if func.is_view or name in _NO_LAUNCH or not self.open:
            return
        self.count("launches", name)
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor):
                for counts in self.open:
                    counts.largest = max(counts.largest, x.numel() * x.itemsize)


def memshard_line() -> str:
    """Return the innermost line of memshard that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


def assumed(name: str, like: Tensor) -> Tensor:
    """Return what numbers are taken to be that are not known."""
    value = like.dtype != torch.bool or name in ("all", "isfinite")
    return torch.full(like.shape, value, dtype=like.dtype)


def _real(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, FakeTensor) and not x.is_meta


def _masks(args: Any) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _unsized_repeat(name: str, kwargs: dict[str, Any] | None) -> bool:
    return name == "repeat_interleave" and (kwargs or {}).get("output_size") is None


def _elements(out: Any) -> int:
    return max((x.numel() for x in tree_flatten(out)[0] if isinstance(x, Tensor)), default=0)


def _largest(name: str, args: Any, kwargs: dict[str, Any] | None) -> Any:
    """Return results of the largest possible shape, on the meta device."""
    x = args[0]
    n = x.numel()

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if name == "equal":
        return True
    if name == "nonzero":
        return empty(n, x.dim())
    if name in ("_unique2", "unique_consecutive"):
        inverse = empty(*x.shape) if name == "_unique2" else empty(0)
        return empty(n, dtype=x.dtype), inverse, empty(n)
    if name == "bincount":
        least = args[2] if len(args) > 2 else (kwargs or {}).get("minlength", 0)
        return empty(max(least, 1))
    if name == "masked_select":
        return empty(n, dtype=x.dtype)
    if name.startswith("index_put") or name == "_index_put_impl_":
        return x
    if name in ("index", "_unsafe_index"):
        (mask,) = [i for i in args[1] if i is not None]
        return empty(mask.numel(), *x.shape[mask.dim() :], dtype=x.dtype)
    if name == "repeat_interleave":
        return empty(n)
    raise NotImplementedError(name)
