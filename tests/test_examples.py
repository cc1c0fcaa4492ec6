"""The examples of docs/adopt.md run, learn, and lose nothing when they are saved,
loaded and resumed.
"""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memshard import full_state_dict, load_full_state_dict, slot_usage
from memshard.models.memory.table import externalize_tables, find_tables
from tests.distributed import run_distributed

pytestmark = pytest.mark.filterwarnings("default")


def _assert_equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from examples.huggingface import MemoryLlamaForCausalLM, text, train

    model, losses = train(tmp_path, 6)
    assert losses[-1] < losses[0] - 1
    resumed, _ = train(tmp_path / "resumed", 6, tmp_path / "checkpoint-3")
    _assert_equal_bits(resumed.state_dict(), model.state_dict())

    model.save_pretrained(tmp_path / "final")
    loaded = MemoryLlamaForCausalLM.from_pretrained(tmp_path / "final")
    externalize_tables(loaded)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    refilled = copy.deepcopy(resumed)
    refilled.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    batch = torch.stack([row["input_ids"] for row in text()[:2]])
    logits = model.eval()(batch).logits
    for other in (loaded, refilled, copy.deepcopy(model)):
        assert torch.equal(other.eval()(batch).logits, logits)

    (usage,) = slot_usage(model, [{"input_ids": batch}]).values()
    assert 0 < usage.usage < 1
    ((_, table),) = find_tables(model)
    assert not table.reads, "evaluation keeps nothing"


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from examples.lightning_trainer import MemoryModel, text, train

    module = train(tmp_path, 6)
    assert module.losses[-1] < module.losses[0] - 1
    loaded = MemoryModel.load_from_checkpoint(tmp_path / "epoch=1.ckpt", weights_only=True)
    batch = text()[:2]
    assert torch.equal(loaded.eval().model(batch).logits, module.eval().model(batch).logits)
    resumed = train(tmp_path / "resumed", 6, tmp_path / "epoch=0.ckpt")
    _assert_equal_bits(resumed.state_dict(), module.state_dict())


def _ddp(
    rank: int, world: int, saved: Any, steps: list[int]
) -> tuple[list[float], Tensor, list[Any]]:
    """Return losses, logits at the end, and states after some numbers of steps."""
    from examples.ddp import build, text, train

    model, optimizer = build()
    if saved:
        load_full_state_dict(model, optimizer, *saved)
    losses, states = [], []
    for first, last in pairwise(steps):
        losses += train(model, optimizer, first, last - first)
        states.append(copy.deepcopy(full_state_dict(model, optimizer)))
    return losses, model(text()[:2, :-1]).detach(), states


def test_plain_ddp() -> None:
    from examples.ddp import build, text

    (losses, logits, (half, straight)), (_, _, nothing) = run_distributed(_ddp, 2, None, [0, 4, 6])
    assert nothing == [None, None] and losses[-1] < losses[0] - 1
    (_, same_logits, (resumed,)), _ = run_distributed(_ddp, 2, half, [4, 6])
    _assert_equal_bits(resumed[0], straight[0])
    assert torch.equal(same_logits, logits)

    # One process loads the same state, with or without load_full_state_dict, and goes on as two do.
    alone, _ = build()
    alone.load_state_dict(straight[0])
    torch.testing.assert_close(alone(text()[:2, :-1]), logits, rtol=1e-4, atol=1e-4)
    _, continued, _ = _ddp(0, 1, half, [4, 6])
    torch.testing.assert_close(continued, logits, rtol=1e-3, atol=1e-3)


def _own_loop(rank: int, world: int) -> list[float]:
    from examples.own_loop import train

    return train(6)


def test_a_loop_of_ones_own() -> None:
    alone = _own_loop(0, 1)
    assert alone[-1] < alone[0] - 1
    for losses in run_distributed(_own_loop, 2):
        assert losses == pytest.approx(alone, rel=1e-4)
