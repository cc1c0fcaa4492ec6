"""A memory under torch.compile and torch.export, hidden or not."""

import logging
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from memshard.models.kernels.plain_topk import _ranked_without_branch, ranked_topk
from memshard.models.memory.peer import Peer
from memshard.models.memory.product_key import ProductKeyMemory
from memshard.models.memory.table import externalize_tables
from memshard.trainer.optim.rows.adam import RowAdam

_SIZES: dict[str, Any] = {"keys": 8, "heads": 2, "topk": 4, "key_dim": 8}


def _layer(kind: type[ProductKeyMemory], hidden: bool) -> nn.Module:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = kind(6, **_SIZES)
    if hidden:
        RowAdam(externalize_tables(layer))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_search_without_a_branch_is_the_search(dtype: torch.dtype) -> None:
    """Also where scores tie, are infinite or a negative 0."""
    scores = torch.randint(-3, 4, (200, 40)).to(dtype)
    scores[:20, 7], scores[20:40, 5], scores[40:60, 30:] = torch.inf, -torch.inf, -0.0
    scores[60:] += torch.randn(140, 40, dtype=dtype)
    assert torch.equal(_ranked_without_branch(scores, 9), ranked_topk(scores, 9))
    assert torch.equal(_ranked_without_branch(scores, 40), ranked_topk(scores, 40))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
def test_layers_are_exported_for_any_batch(kind: type[ProductKeyMemory], hidden: bool) -> None:
    layer = _layer(kind, hidden).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(2, 5, 6),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 5, 6)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("kind", [ProductKeyMemory, Peer])
def test_evaluation_is_one_graph(kind: type[ProductKeyMemory], hidden: bool) -> None:
    layer = _layer(kind, hidden).eval()
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


def test_training_of_a_visible_table_is_one_graph() -> None:
    layer = _layer(ProductKeyMemory, False)
    twin = deepcopy(layer)
    x = torch.randn(2, 5, 6)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    twin(x).square().sum().backward()
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, weight.grad)
    torch.testing.assert_close(layer.query_norm.running_var, twin.query_norm.running_var)


# torch hides warnings that it causes itself, which it cannot if they are errors.
@pytest.mark.filterwarnings("default")
def test_training_of_a_hidden_table_is_several_graphs(caplog: pytest.LogCaptureFixture) -> None:
    """Silently."""
    layer = _layer(Peer, True)
    twin = deepcopy(layer)
    x = torch.randn(2, 5, 6)
    torch.compile(layer, backend="aot_eager")(x).square().sum().backward()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    twin(x).square().sum().backward()
    for table, other in zip(layer.tables, twin.tables, strict=True):
        (read,), (expected,) = table.reads, other.reads
        torch.testing.assert_close(vars(read), vars(expected))


def test_a_hidden_table_in_one_graph_is_refused() -> None:
    """In a process of its own: after this error torch holds an array more in the backward passes of
    reversible layers, which other tests count.
    """
    script = """
import torch
from tests.models.test_compile_memory import Peer, _layer
torch.compile(_layer(Peer, True), fullgraph=True, backend="aot_eager")(torch.randn(2, 5, 6))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Unsupported" in done.stderr and "hidden table collects its gradient" in done.stderr


def test_compiled_backward_passes_of_a_hidden_table_are_refused() -> None:
    """In a process of its own, as above. Those of a visible table are as others."""
    script = """
from copy import deepcopy
import torch
from torch._dynamo.compiled_autograd import _enable
from tests.models.test_compile_memory import Peer, _layer
x = torch.randn(2, 5, 6)
layer, hidden = _layer(Peer, False), _layer(Peer, True)
twin = deepcopy(layer)
twin(x).square().sum().backward()
with _enable(torch.compile(backend="eager")):
    layer(x).square().sum().backward()
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, weight.grad)
    print("equal")
    hidden(x).square().sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "equal" in done.stdout and "learns nothing under compiled autograd" in done.stderr
