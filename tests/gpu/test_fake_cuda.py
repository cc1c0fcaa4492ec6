"""The fake device: what it refuses, as a GPU does, and what it counts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.fake_cuda import Counts, fake_cuda, on_fake_cuda


def _message(mix: str) -> str:
    with fake_cuda():
        x = torch.ones(4, 3, device="cuda")
        mixes: dict[str, Callable[[], object]] = {
            "sum": lambda: x + torch.ones(4, 3),
            "layer": lambda: nn.Linear(3, 3)(x),
            "attention": lambda: nn.functional.scaled_dot_product_attention(
                x, x, x, torch.ones(4, 4)
            ),
            "numpy": lambda: x.numpy(),
        }
        try:
            mixes[mix]()
        except (RuntimeError, TypeError) as error:
            return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("mix", ["sum", "layer", "attention", "numpy"])
def test_what_mixes_devices_is_refused(mix: str) -> None:
    assert "cuda:0" in on_fake_cuda(_message, mix)


def _count(case: str) -> tuple[object, Counts]:
    with fake_cuda() as watch:
        x = torch.arange(6.0).view(2, 3).to("cuda").requires_grad_()
        cases: dict[str, Callable[[], object]] = {
            "arithmetic": lambda: (x * 2 + torch.tensor(1.0)).sum().backward(),
            "item": lambda: float(x.sum()),
            "branch": lambda: bool((x > 4).any()),
            "tolist": lambda: x.tolist(),
            "nonzero": lambda: len(x.nonzero()),
            "mask": lambda: x[x > 2].shape[0],
            "unique": lambda: len(torch.unique(x > 2)),
            "synchronize": lambda: torch.cuda.synchronize(),
            "write where": lambda: x.detach().masked_fill_(x > 2, 0.0).numel(),
            "constant": lambda: torch.tensor([1.0, 2.0], device="cuda").numel(),
            "to the host": lambda: x.detach().cpu().sum().item(),
            "pageable": lambda: torch.ones(3).to("cuda", non_blocking=True).numel(),
            "pinned": lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True).numel(),
            "index": lambda: x[torch.tensor([1])].shape[0],
        }
        with watch.counted() as counts:
            result = cases[case]()
    return result, counts


@pytest.mark.parametrize(
    ("case", "result", "waits", "blocking"),
    [
        ("arithmetic", None, 0, 0),
        ("item", 15.0, 1, 0),
        ("branch", True, 1, 0),
        ("tolist", [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], 1, 0),
        ("nonzero", 5, 1, 0),
        ("mask", 3, 1, 0),
        ("unique", 2, 1, 0),
        ("synchronize", None, 1, 0),
        ("write where", 6, 0, 0),
        ("constant", 2, 0, 1),
        ("to the host", 15.0, 0, 1),
        ("pageable", 3, 0, 1),
        ("pinned", 3, 0, 0),
        ("index", 1, 0, 1),
    ],
)
def test_waits_and_blocking_copies_are_counted(
    case: str, result: object, waits: int, blocking: int
) -> None:
    outcome, counts = on_fake_cuda(_count, case)
    assert outcome == result
    assert (counts.waits.total(), counts.blocking.total()) == (waits, blocking), counts


def _moved() -> tuple[bool, Tensor, Tensor]:
    layer = nn.Linear(3, 2)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    with fake_cuda():
        before = list(layer.parameters())
        layer.to("cuda")
        same = all(p is q for p, q in zip(before, layer.parameters(), strict=True))
        layer(torch.ones(5, 3, device="cuda")).sum().backward()
        optimizer.step()
        moved = layer.weight.detach().cpu()
    optimizer = torch.optim.AdamW(twin.parameters(), fused=True)
    twin(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    return same, moved, twin.weight.detach()


def test_a_model_that_moves_trains_to_the_same_numbers() -> None:
    same, moved, twin = on_fake_cuda(_moved)
    assert same and torch.equal(moved, twin)


def _large() -> Counts:
    with fake_cuda(computed=4096) as watch, watch.counted() as counts:
        x = torch.empty(1 << 40, 1024, device="cuda", dtype=torch.float16)
        rows = torch.zeros(8, dtype=torch.int64, device="cuda")
        assert x.index_select(0, rows).float().isfinite().all()
    return counts


def test_tensors_larger_than_any_memory_have_a_shape() -> None:
    counts = on_fake_cuda(_large)
    assert counts.largest == 8 * 1024 * 4 and counts.waits.total() == 1
