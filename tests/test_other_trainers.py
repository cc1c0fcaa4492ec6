"""What works in other people's trainers, optimizers and inference stays that way."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn.utils import clip_grad_value_
from torch.optim import lr_scheduler

from memshard import CombinedOptimizer, ProductKeyMemory, RowAdam, externalize_tables, find_tables
from tests.tiny_llama import (
    LLAMA,
    MEMORY,
    both_optimizers,
    hugging_face_trainer,
    tiny_llama,
    tokens,
    train,
)

transformers = pytest.importorskip("transformers")

# Other projects' warnings are theirs.
pytestmark = pytest.mark.filterwarnings("default")


def _trained(model: nn.Module, optimizer: Any = None) -> None:
    """Train a model whose table is hidden; both kinds of weights must move."""
    ((_, table),) = find_tables(model)
    before, dense = table.weight.clone(), model.lm_head.weight.detach().clone()
    train(model, optimizer or both_optimizers(model, [table]))
    assert not torch.equal(table.weight, before) and not torch.equal(model.lm_head.weight, dense)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "bf16": True, "gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True},
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_hugging_face_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    """It learns, and goes on after three of six steps as if it had not stopped."""
    runs: list[dict[str, Any]] = []
    for resumed in (False, True):
        model = tiny_llama()
        optimizer = both_optimizers(model, externalize_tables(model))
        trainer = hugging_face_trainer(
            model,
            tmp_path / str(resumed),
            optimizers=(optimizer, None),
            logging_steps=1,
            save_steps=3,
            **{"max_steps": 6} | settings,
        )
        trainer.train(
            resume_from_checkpoint=str(tmp_path / "False/checkpoint-3") if resumed else None
        )
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        runs.append(model.state_dict())
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["GPT2", "Qwen2"])
def test_other_models(kind: str) -> None:
    if kind == "GPT2":
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        model.transformer.h[1].mlp = ProductKeyMemory(16, **MEMORY)
    else:
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**LLAMA, num_key_value_heads=2)
        )
        model.model.layers[1].mlp = ProductKeyMemory(16, **MEMORY)
    externalize_tables(model)
    _trained(model)


_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], optim.Optimizer]] = {
    "fused": lambda weights: optim.AdamW(weights, fused=True),
    "foreach": lambda weights: optim.AdamW(weights, foreach=True),
    "SGD": lambda weights: optim.SGD(weights, 0.1, momentum=0.9),
    "Adafactor": lambda weights: optim.Adafactor(weights),
    "Muon": lambda weights: optim.Muon([weight for weight in weights if weight.ndim == 2]),
    "decay": lambda weights: optim.AdamW(
        [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
            {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
        ]
    ),
}


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_dense_optimizers_beside_row_adam(name: str) -> None:
    model = tiny_llama()
    tables = externalize_tables(model)
    dense = _OPTIMIZERS[name](list(model.parameters()))
    optimizer, steps = CombinedOptimizer(dense, RowAdam(tables, 1e-2)), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    _trained(model, optimizer)
    assert len(steps) == 3


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [3e-3, 1e-2], total_steps=4),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
                lr_scheduler.CosineAnnealingLR(optimizer, 4),
            ],
            [2],
        ),
    ],
)
def test_schedules_reach_both_optimizers(schedule: Callable[[Any], Any]) -> None:
    model = tiny_llama()
    optimizer = both_optimizers(model, externalize_tables(model))
    scheduler, seen = schedule(optimizer), []
    for _ in range(3):
        _trained(model, optimizer)
        clip_grad_value_(model.parameters(), 0.1)
        scheduler.step()
        seen.append([member.param_groups[0]["lr"] for member in optimizer.optimizers])
    assert len({rate for _, rate in seen}) > 1
    for dense, rows in seen:
        assert rows / dense == pytest.approx(10 / 3, rel=0.01)


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_llama()
    tables = externalize_tables(model)
    plain = both_optimizers(model, tables)
    wrapped, optimizer = accelerator.prepare(model, plain)
    before = tables[0].weight.clone()
    for step in range(4):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(tokens(step), labels=tokens(step)).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    after = tables[0].weight.clone()
    assert (
        not torch.equal(after, before) and plain.optimizers[1].state[tables[0].anchor]["step"] == 2
    )
    accelerator.save_state(tmp_path)
    tables[0].weight.zero_()
    accelerator.load_state(tmp_path)
    assert torch.equal(tables[0].weight, after)


def test_generation_and_inference() -> None:
    model = tiny_llama()
    externalize_tables(model)
    _trained(model)
    model.eval()
    x = tokens()[:2]
    settings = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(x, do_sample=False, **settings)
    assert torch.equal(cached, model.generate(x, do_sample=False, use_cache=False, **settings))
    assert model.generate(x, num_beams=3, **settings).shape == (2, 14)
    logits = model(x).logits
    with torch.inference_mode():
        assert torch.equal(model(x).logits, logits)
    called = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
    assert torch.equal(called.logits, logits)
    for dtype in (torch.float16, torch.bfloat16):
        half = tiny_llama()
        half.load_state_dict(model.state_dict())
        externalize_tables(half)
        torch.testing.assert_close(
            half.to(dtype).eval()(x).logits.float(), logits, atol=0.1, rtol=0
        )


def test_files_of_others(tmp_path: Path) -> None:
    """safetensors, pickles, device_map, and optimizer states that hold nothing but weights."""
    from safetensors.torch import load_model, save_model

    model = tiny_llama()
    optimizer = both_optimizers(model, externalize_tables(model))
    train(model, optimizer)
    logits = model.eval()(tokens()).logits
    save_model(model, tmp_path / "model.safetensors")
    other = tiny_llama()
    externalize_tables(other)
    load_model(other, tmp_path / "model.safetensors")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    for copied in (other, pickled):
        assert torch.equal(copied.eval()(tokens()).logits, logits)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    copied = both_optimizers(other, [table for _, table in find_tables(other)])
    copied.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for part, its in ((model, optimizer), (other, copied)):
        train(part.train(), its)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_adapters_are_merged() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    tables = externalize_tables(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "query"], r=2))
    train(wrapped, both_optimizers(wrapped, tables))
    logits = wrapped.eval()(tokens()).logits
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, logits)
    ((_, table),) = find_tables(merged)
    assert table is tables[0] and table.hidden
