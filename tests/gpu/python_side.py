"""What torch does in Python or in C++ before the dispatcher, and so before `Watch`, sees it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from tests.gpu import fake_device
from tests.gpu.watch import Watch, assumed, values_of


def _nobody(what: str) -> None:
    """Count nothing: nobody watches."""


launched: Callable[[str], None] = _nobody
"""Told what attention asks of the device; set by `fake_cuda`."""


class Python(TorchFunctionMode):
    """What torch does in C++ with the numbers of a CUDA tensor before the dispatcher sees it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            return self._from_python(func, args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], FakeTensor):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy "
                "the tensor to host memory first."
            )
        if func == Tensor.data.__set__ and isinstance(args[1], FakeTensor):
            become(args[0], args[1].detach())
            return None
        return func(*args, **kwargs)

    def _from_python(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Make a tensor on the host and copy it, as torch does."""
        device = kwargs.pop("device", None)
        if func is Tensor.new_tensor:
            like, *args = args
            kwargs.setdefault("dtype", like.dtype)
            device, func = device or like.device, torch.tensor
        if args and isinstance(args[0], Tensor) and func is not torch.tensor:
            made: Tensor = args[0].to(device or args[0].device)
            return made
        grad = kwargs.pop("requires_grad", False)
        made = func(*args, **kwargs, device="cpu") if device else func(*args, **kwargs)
        if device is not None and torch.device(device).type != "cpu":
            made = made.to(device)
        return made.requires_grad_() if grad else made


_torch_attention = F.scaled_dot_product_attention


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if not isinstance(q, FakeTensor):
        return _torch_attention(q, k, v, attn_mask, dropout_p, **options)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    # Flash attention takes no masks and 16 bits only, the memory-efficient one no groups.
    name = "attention in parts" if enable_gqa else "efficient attention"
    if attn_mask is None and q.dtype != torch.float32:
        name = "flash attention"
    out: Tensor = _Attention.apply(name, q, k, v, attn_mask, options)
    return out


class _Attention(torch.autograd.Function):
    """One launch forward and one backward, as on a GPU; torch would choose another way here."""

    @staticmethod
    def forward(ctx, name, q, k, v, mask, options):  # type: ignore[no-untyped-def]
        tensors = [x for x in (q, k, v, mask) if x is not None]
        if any(not isinstance(x, FakeTensor) for x in tensors):
            raise RuntimeError(f"attention of tensors on {[str(x.device) for x in tensors]}")
        if not q.dtype == k.dtype == v.dtype:
            raise RuntimeError(f"attention of {q.dtype}, {k.dtype} and {v.dtype}")
        ctx.name, ctx.options, ctx.mask = name, options, mask
        ctx.save_for_backward(q, k, v)
        launched(name)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        numbers = [values_of(x) for x in tensors]
        if all(x is not None for x in numbers):
            out.known_values = _torch_attention(*numbers, **options)
        return out

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        launched(f"{ctx.name} backward")
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in inputs]
        numbers = [values_of(x) for x in (upstream, *inputs)]
        if all(x is not None for x in numbers):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in numbers[1:]]
                mask = None if ctx.mask is None else values_of(ctx.mask)
                out = _torch_attention(*leaves, mask, **ctx.options)
            for gradient, values in zip(
                gradients, torch.autograd.grad(out, leaves, numbers[0]), strict=True
            ):
                gradient.known_values = values
        return None, *gradients, None, None


def install() -> None:
    """Change in this process what no mode sees."""

    def tolist(x: FakeTensor) -> Any:
        fake_device.waited("tolist")
        values = values_of(x)
        return (assumed("", x) if values is None else values).tolist()

    FakeTensor.tolist = tolist
    # A GPU's tensors are of a type that torch takes many of at once.
    torch.utils._foreach_utils._foreach_supported_types.append(FakeTensor)
    # Not in a mode, which is off while it handles `backward` and what that repeats.
    F.scaled_dot_product_attention = _attention
    FakeTensor.record_stream = lambda x, stream: None
    nn.Module._apply = _apply


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Do what `nn.Module._apply` does, whose parameters stay the same objects on another device."""
    if recurse:
        for child in module.children():
            child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                new = function(parameter)
            if parameter.is_meta is not new.is_meta:
                module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
            elif new is not parameter:
                become(parameter, new.detach())
            if parameter.grad is not None:
                raise NotImplementedError("a model with gradients moves")
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def become(x: Tensor, new: Tensor) -> None:
    """Give a tensor the content of a fake one: it moves to the device, and stays the same object to
    optimizers, as on a GPU.
    """
    parameter, grad = isinstance(x, nn.Parameter), x.requires_grad
    new.requires_grad_(grad)
    kept = dict(x.__dict__)
    x.__class__, new.__class__ = type(new), type(x)
    old, x.__dict__ = x.__dict__, new.__dict__
    new.__dict__ = old
    torch._C._swap_tensor_impl(x, new)
    for name, value in kept.items():
        x.__dict__.setdefault(name, value)
    if parameter:
        x._is_param = True
