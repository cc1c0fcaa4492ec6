"""Whoever records a memory, or asks for its shapes alone, gets plain torch: never compiled code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from memshard import Peer, ProductKeyMemory, externalize_tables
from memshard.models import compat

Layer = Callable[..., ProductKeyMemory]
_LAYERS = pytest.mark.parametrize("layer", [ProductKeyMemory, Peer])
_SIZES = {"dim": 6, "keys": 8, "heads": 2, "topk": 3, "key_dim": 8}


@_LAYERS
@pytest.mark.parametrize("hidden", [False, True])
def test_a_recorded_memory_computes_what_the_memory_does(layer: Layer, hidden: bool) -> None:
    """Of compiled kernels a recording has the memory they fill, with whatever was in it."""
    memory = layer(**_SIZES).eval()
    if hidden:
        externalize_tables(memory)
    with torch.no_grad():
        recorded = make_fx(memory)(torch.randn(2, 5, 6))
        x = torch.randn(2, 5, 6)
        torch.testing.assert_close(recorded(x), memory(x))


@_LAYERS
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
def test_jit_traces_are_refused(layer: Layer) -> None:
    memory = layer(**_SIZES).eval()
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"torch\.export\.export"):
        torch.jit.trace(memory, torch.randn(5, 6))


@_LAYERS
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_are_computed_without_numbers(layer: Layer, hidden: bool, device: str) -> None:
    """On tensors without memory a compiled kernel would crash the process."""

    def shapes(device: str) -> Tensor:
        memory = layer(**_SIZES, device=device)
        if hidden:
            externalize_tables(memory)
        with torch.no_grad():
            return memory(torch.randn(2, 5, 6, device=device))

    if device == "meta":
        assert shapes("meta").is_meta
        return
    with FakeTensorMode():
        y = shapes("cpu")
    assert y.shape == (2, 5, 6) and compat.is_fake(y)
    # Nothing that is kept for later was made there.
    memory = layer(**_SIZES)
    assert memory(torch.randn(2, 5, 6)).isfinite().all()


def test_kernels_are_tested_outside_of_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first table that is made under FakeTensorMode decides for all that follow."""
    from memshard.models.kernels import backend

    monkeypatch.setenv("MEMSHARD_KERNELS", "")
    expected = backend.backend_for.__wrapped__(torch.device("cpu"))[1]
    with FakeTensorMode():
        assert backend.backend_for.__wrapped__(torch.device("cpu"))[1] == expected
