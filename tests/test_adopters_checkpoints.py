"""Hugging Face's checkpoints of models with memories are loaded whole, in one process and several,
and so are models in bf16 and under FSDP2 (docs/adopt.md).
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from memshard import (
    CombinedOptimizer,
    ProductKeyMemory,
    RowAdam,
    externalize_tables,
    find_tables,
    full_state_dict,
    shard_tables,
)
from tests.distributed import run_distributed
from tests.test_adopters import _run_block
from tests.tiny_llama import LLAMA, MEMORY

transformers = pytest.importorskip("transformers")

# Other projects' warnings are theirs.
pytestmark = pytest.mark.filterwarnings("default")

_CONFIG = LLAMA | {"vocab_size": 256}
_NAMES = {
    "AdamW": AdamW,
    "CombinedOptimizer": CombinedOptimizer,
    "RowAdam": RowAdam,
    "externalize_tables": externalize_tables,
    "full_state_dict": full_state_dict,
    "fully_shard": fully_shard,
    "shard_tables": shard_tables,
    "torch": torch,
}


def _config(*layers: int) -> Any:
    from examples.huggingface import MemoryLlamaConfig

    return MemoryLlamaConfig(**_CONFIG, memory_layers=layers, memory=MEMORY)


def _model(*layers: int) -> Any:
    from examples.huggingface import MemoryLlamaForCausalLM

    transformers.set_seed(0)
    return MemoryLlamaForCausalLM(_config(*layers))


def _tokens(seed: int = 0) -> Tensor:
    return torch.randint(256, (4, 8), generator=torch.Generator().manual_seed(seed))


def _train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(_tokens(step), labels=_tokens(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_a_dense_checkpoint_gets_memories_that_are_initialised(
    layers: tuple[int, ...], tmp_path: Path
) -> None:
    from examples.huggingface import MemoryLlamaForCausalLM

    transformers.set_seed(0)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_CONFIG))
    dense.save_pretrained(tmp_path)
    loaded = MemoryLlamaForCausalLM.from_pretrained(tmp_path, config=_config(*layers))
    fresh = _model(*layers)
    for name, tensor in loaded.state_dict().items():
        if f"layers.{layers[0]}.mlp" not in name and f"layers.{layers[-1]}.mlp" not in name:
            assert torch.equal(tensor, dense.state_dict()[name]), name
        elif "query_norm" in name:
            assert torch.equal(tensor, fresh.state_dict()[name]), name
        else:
            # Drawn from the same distribution.
            torch.testing.assert_close(
                tensor.std(), fresh.state_dict()[name].std(), rtol=0.3, atol=0.02, msg=name
            )
    loss = loaded.train()(_tokens(), labels=_tokens()).loss
    torch.testing.assert_close(
        loss, fresh.train()(_tokens(), labels=_tokens()).loss, rtol=0.05, atol=0
    )


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_saved_memories_are_loaded_by_the_auto_class_and_shared_ones_stay_shared(
    layers: tuple[int, ...], tmp_path: Path
) -> None:
    model = _model(*layers)
    tables = externalize_tables(model)
    _train(model, CombinedOptimizer(AdamW(model.parameters()), RowAdam(tables, 1e-2)))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(list(find_tables(loaded))) == 1
    states = model.state_dict()
    assert loaded.state_dict().keys() == states.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, states[name]), name

    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in wide.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if "running" not in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "running" in name} == {torch.float32}

    # Where nobody has registered the class, nothing is loaded in its place.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "not_registered"}))
    with pytest.raises(ValueError, match="not_registered"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_trainer_saves_and_resumes_shared_tables(tmp_path: Path) -> None:
    from examples.huggingface import trainer

    results = []
    for folder, resume in ((tmp_path, None), (tmp_path / "b", str(tmp_path / "checkpoint-2"))):
        model = _model(0, 2)
        trainer(model, folder, 4).train(resume_from_checkpoint=resume)
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def _trainer_on_two(rank: int, world: int, folder: Path) -> list[Any]:
    # As torchrun sets it, for the Trainer's DDP.
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", LOCAL_WORLD_SIZE=str(world))
    from examples.huggingface import trainer

    results = []
    for out, resume in ((folder, None), (folder / "b", str(folder / "checkpoint-2"))):
        model = _model(1)
        run = trainer(model, out, 4)
        run.train(resume_from_checkpoint=resume)
        results.append(full_state_dict(model, run.optimizer))
    return results


def test_the_trainer_saves_whole_tables_that_processes_split(tmp_path: Path) -> None:
    (straight, resumed), nothing = run_distributed(_trainer_on_two, 2, tmp_path)
    assert nothing == [None, None]
    torch.testing.assert_close(resumed[0], straight[0], rtol=0, atol=0)
    import examples.huggingface  # noqa: F401  (registers its class; only the children have so far)

    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    torch.testing.assert_close(saved.state_dict(), dict(straight[0]), rtol=0, atol=0)


def test_a_model_in_bf16_trains_as_on_the_page() -> None:
    names = _run_block("Weights in bf16 or fp16", 0, {**_NAMES, "model": _model(1)})
    model = names["model"]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    (table,) = names["tables"]
    before = table.weight.clone()
    assert all(loss < 7 for loss in _train(model, names["optimizer"]))
    assert table.weight.dtype == torch.bfloat16 and not torch.equal(table.weight, before)


class _Plain(nn.Module):
    """A model without transformers, which takes each process 9 s of CPU time to import; its two
    memories share a table.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(256, 16)
        first = ProductKeyMemory(16, **MEMORY)
        self.memories = nn.ModuleList([first, ProductKeyMemory(16, **MEMORY, values=first.values)])

    def forward(self, tokens: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.embedding(tokens)
        for memory in self.memories:
            x = x + memory(x)
        logits = (x @ self.embedding.weight.T)[:, :-1].flatten(0, 1)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels[:, 1:].flatten()))


def _accelerated(rank: int, world: int, file: Path) -> list[float]:
    accelerate = pytest.importorskip("accelerate")
    # As torchrun sets it; without it accelerate takes the processes for several machines'.
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    accelerator = accelerate.Accelerator(cpu=True)
    names = {**_NAMES, "model": _Plain(), "accelerator": accelerator, "file": file}
    names = _run_block("accelerate", 0, names)
    losses = _train(names["model"], names["optimizer"])
    _run_block("accelerate", 1, names)
    with pytest.raises(RuntimeError, match="data pointer"):
        accelerator.save_state(file.parent / "state")
    return losses


def test_accelerate_trains_split_tables_as_one_process_does(tmp_path: Path) -> None:
    model = _Plain()
    tables = externalize_tables(model)
    optimizer = CombinedOptimizer(AdamW(model.parameters(), 3e-3), RowAdam(tables, 1e-2))
    alone = _train(model, optimizer)
    for losses in run_distributed(_accelerated, 2, tmp_path / "state.pt"):
        assert losses == pytest.approx(alone, rel=1e-4)
    saved = torch.load(tmp_path / "state.pt")
    expected = tables[0].weight.clone()
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["model"])
    torch.testing.assert_close(tables[0].weight, expected, rtol=0, atol=1e-3)
    assert optimizer.state_dict()["state"][len(optimizer.state) - 1]["step"] == 3


def _fsdp2(rank: int, world: int) -> list[float]:
    names = _run_block("FSDP2", 0, {**_NAMES, "model": _model(1)})
    return _train(names["model"], names["optimizer"])


def test_fsdp2_trains_as_one_process_does() -> None:
    model = _model(1)
    optimizer = CombinedOptimizer(
        AdamW(model.parameters(), 3e-3), RowAdam(externalize_tables(model), 1e-2)
    )
    alone = _train(model, optimizer)
    # Both processes read the same batch, so the means of their losses are the same.
    for losses in run_distributed(_fsdp2, 2):
        assert losses == pytest.approx(alone, rel=1e-3)
    assert not dist.is_initialized()
