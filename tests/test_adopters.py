"""Memories in models, trainers and wrappers of other projects (docs/adopt.md)."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as DCP
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import AdamW, swa_utils
from torch.optim.swa_utils import get_ema_multi_avg_fn

import memshard
from memshard import (
    AveragedModel,
    CombinedOptimizer,
    RowAdam,
    externalize_tables,
    find_tables,
)
from tests.tiny_llama import both_optimizers, hugging_face_trainer, tiny_llama, tokens, train

pytest.importorskip("transformers")

# Other projects' warnings are theirs.
pytestmark = pytest.mark.filterwarnings("default")


def _run_block(heading: str, number: int, names: dict[str, Any]) -> dict[str, Any]:
    """Execute a block of the page with these names; return them and those that it makes."""
    page = (Path(__file__).parents[1] / "docs/adopt.md").read_text("utf-8")
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    exec(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number], names)
    return names


def test_tables_without_an_optimizer_are_refused(tmp_path: Path) -> None:
    """At the second step, however the optimizer was forgotten."""
    model = tiny_llama()
    (table,) = externalize_tables(model)
    with pytest.raises(RuntimeError, match=r"no RowAdam was made for it.*optimizers=\(optimizer"):
        hugging_face_trainer(model, tmp_path).train()
    with pytest.raises(RuntimeError, match="no RowAdam"):
        train(model, AdamW(model.parameters()))
    assert len(table.reads) == 1, "no more than one pass is kept"
    with torch.no_grad():
        model(tokens())
    train(model, both_optimizers(model, [table]))
    # A copy needs one of its own, unless it is frozen.
    with pytest.raises(RuntimeError, match="A copy of a table"):
        train(copy.deepcopy(model), AdamW(model.parameters()))
    table.requires_grad_(False)
    train(copy.deepcopy(model), AdamW(model.parameters()))


def _lora(model: nn.Module, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "query"]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, **settings))


def test_lora_leaves_a_frozen_table_alone() -> None:
    """Whether it is hidden before or after."""
    for first in (True, False):
        model = tiny_llama()
        tables = externalize_tables(model) if first else []
        wrapped = _lora(model)
        tables = tables or externalize_tables(wrapped)
        before = tables[0].weight.clone()
        train(wrapped, both_optimizers(wrapped, tables))
        assert torch.equal(tables[0].weight, before) and not tables[0].reads
        # Asked for by name, it learns beside the adapters.
        tables[0].requires_grad_()
        train(wrapped, both_optimizers(wrapped, tables))
        assert not torch.equal(tables[0].weight, before)


def test_a_memory_is_an_adapter_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    names = {**globals(), **vars(peft), "model": tiny_llama()}
    names = _run_block("Freezing, and PEFT", 0, names)
    wrapped, tables = names["model"], names["tables"]
    before = [table.weight.clone() for table in tables]
    train(wrapped, names["optimizer"])
    moved = [
        name
        for (name, table), old in zip(find_tables(wrapped), before, strict=True)
        if not torch.equal(table.weight, old)
    ]
    assert len(moved) == 1 and "modules_to_save.default" in moved[0]
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(tokens()).logits, wrapped.eval()(tokens()).logits)


@pytest.mark.parametrize("part", ["values", "sub_keys"])
def test_a_part_of_a_memory_is_trained_and_saved_by_peft(part: str, tmp_path: Path) -> None:
    """With the statistics of its queries, which move in training."""
    model = tiny_llama()
    externalize_tables(model)
    wrapped = _lora(model, modules_to_save=[part, "query_norm"])
    tables = externalize_tables(wrapped)
    before = copy.deepcopy(wrapped.state_dict())
    train(wrapped, both_optimizers(wrapped, tables))
    moved = [
        name for name, new in wrapped.state_dict().items() if not torch.equal(new, before[name])
    ]
    assert [name for name in moved if f"mlp.{part}.modules_to_save.default" in name]
    assert not [name for name in moved if "original_module.weight" in name]
    wrapped.save_pretrained(tmp_path)
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(tokens()).logits, wrapped.eval()(tokens()).logits)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_memories_are_read(where: str, hidden: bool, tmp_path: Path) -> None:
    """As device_map="auto" offloads models that are larger than a GPU."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llama().eval()
    externalize_tables(model) if hidden else None
    logits = model(tokens()).logits
    cpu = torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=cpu)
    assert model.model.layers[1].mlp.sub_keys.weight.is_meta
    assert torch.equal(model(tokens()).logits, logits)


def test_parts_that_are_pruned_or_parametrized_train() -> None:
    """Visible values too; to hide those is refused."""
    model = tiny_llama()
    memory = model.model.layers[1].mlp
    prune.l1_unstructured(memory.sub_keys, "weight", 0.5)
    parametrizations.spectral_norm(memory.query)
    tables = externalize_tables(model)
    before = tables[0].weight.clone()
    train(model, both_optimizers(model, tables))
    assert float((memory.sub_keys.weight == 0).float().mean()) == 0.5
    assert not torch.equal(tables[0].weight, before)
    for change in (
        lambda table: prune.l1_unstructured(table, "weight", 0.5),
        lambda table: register_parametrization(table, "weight", nn.Identity()),
    ):
        model = tiny_llama()
        table = model.model.layers[1].mlp.values
        change(table)
        before = table.weight.clone()
        train(model, AdamW(model.parameters(), 1e-2))
        model(tokens())
        assert not torch.equal(table.weight, before)
        with pytest.raises(ValueError, match="values are no plain parameter any more"):
            externalize_tables(model)


def test_values_that_are_assigned_as_a_parameter_go_on_learning() -> None:
    """To a hidden table, for which there is an optimizer."""
    model = tiny_llama()
    (table,) = externalize_tables(model)
    optimizer = both_optimizers(model, [table])
    table.weight = nn.Parameter(torch.zeros_like(table.weight))
    train(model, optimizer)
    assert table.hidden and table.weight.any()


def test_a_layer_that_peft_copies_after_hiding_is_refused() -> None:
    model = tiny_llama()
    tables = externalize_tables(model)
    wrapped = _lora(model, modules_to_save=["mlp"])
    with pytest.raises(RuntimeError, match="modules_to_save.*externalize_tables after copying"):
        train(wrapped, both_optimizers(wrapped, tables))


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", [get_ema_multi_avg_fn(0.5), None])
def test_an_average_of_the_weights_covers_hidden_tables(use_buffers: bool, average: Any) -> None:
    """It is that of a model whose table is visible and takes the same values."""
    model = tiny_llama(query_norm="layer").double()
    optimizer = both_optimizers(model, externalize_tables(model))
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    twin = tiny_llama(query_norm="layer").double()
    expected = swa_utils.AveragedModel(twin, multi_avg_fn=average, use_buffers=use_buffers)
    for step in range(4):
        model(tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        twin.load_state_dict(model.state_dict())
        expected.update_parameters(twin)
    torch.testing.assert_close(averaged.state_dict(), expected.state_dict())
    name = "model.layers.1.mlp.values.weight"
    assert not torch.equal(averaged.module.state_dict()[name], model.state_dict()[name])
    (table,) = (table for _, table in find_tables(averaged))
    assert table.hidden and not list(table.parameters())


def test_an_average_that_would_miss_tables_is_refused() -> None:
    model = tiny_llama()
    swa_utils.AveragedModel(model)
    externalize_tables(model)
    with pytest.raises(ValueError, match="use memshard.AveragedModel"):
        swa_utils.AveragedModel(model)
    lightning = pytest.importorskip("lightning.pytorch")
    callback = lightning.callbacks.EMAWeightAveraging()
    module = lightning.LightningModule()
    module.model = model
    with pytest.raises(ValueError, match="use memshard.AveragedModel"):
        callback.setup(lightning.Trainer(logger=False, accelerator="cpu"), module, "fit")


def test_the_page_averages_compiles_and_exports() -> None:
    model = tiny_llama()
    names = {**globals(), "model": model, "batches": [tokens()] * 2}
    names["optimizer"] = both_optimizers(model, externalize_tables(model))
    _run_block("Averages of the weights (EMA)", 0, names)
    average, trained = (next(find_tables(part))[1].weight for part in (names["averaged"], model))
    assert not torch.equal(average, trained)
    torch.testing.assert_close(average, trained, rtol=0, atol=0.1)
    _run_block("torch.compile and torch.export", 0, names)
    x = torch.randn(5, 8, 16)
    torch.testing.assert_close(names["program"].module()(x), names["layer"](x))


def test_optimizers_whose_groups_have_names_are_combined() -> None:
    model = tiny_llama()
    tables = externalize_tables(model)
    optimizer = CombinedOptimizer(AdamW(model.named_parameters(), 3e-3), RowAdam(tables, 1e-2))
    before = tables[0].weight.clone()
    train(model, optimizer)
    assert not torch.equal(tables[0].weight, before)
    assert optimizer.param_groups[0]["param_names"][0] == "model.embed_tokens.weight"
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)


def test_a_model_is_copied_between_backward_and_step() -> None:
    """With its optimizer. The gradient stays behind, as torch leaves parameters' gradients."""
    model = tiny_llama()
    optimizer = both_optimizers(model, externalize_tables(model))
    train(model, optimizer)
    optimizer.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    copied, its_optimizer = copy.deepcopy((model, optimizer))
    ((_, table),), ((_, other),) = find_tables(model), find_tables(copied)
    assert len(table.reads) == 1 and not other.reads and other.anchor.grad is None
    for part, its in ((model, optimizer), (copied, its_optimizer)):
        train(part, its)
    torch.testing.assert_close(copied.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_members_of_a_combined_optimizer_keep_states_of_their_own() -> None:
    """Each can be saved and loaded alone, and stays a member."""
    runs = []
    for part in ("whole", "members"):
        model = tiny_llama()
        optimizer = both_optimizers(model, externalize_tables(model))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        train(model, optimizer)
        for each in [optimizer] if part == "whole" else optimizer.optimizers:
            each.load_state_dict(copy.deepcopy(each.state_dict()))
        schedule.step()
        assert [group["lr"] for group in optimizer.optimizers[1].param_groups] == [0.005]
        train(model, optimizer)
        runs.append((model.state_dict(), optimizer.state_dict()["state"]))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("late", [torch.float64, torch.bfloat16])
def test_a_model_that_is_cast_after_its_optimizer_was_made_is_refused(late: torch.dtype) -> None:
    model = tiny_llama(query_norm="layer")
    optimizer = both_optimizers(model, externalize_tables(model))
    model.to(late)
    with pytest.raises(RuntimeError, match="cast the model first, then make the optimizer"):
        train(model, optimizer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_batch_once(reentrant: bool) -> None:
    statistics = []
    for checkpointed in (False, True):
        model = tiny_llama()
        externalize_tables(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()(tokens(), labels=tokens()).loss.backward()
        statistics.append(model.model.layers[1].mlp.query_norm.running_mean)
    assert statistics[0].any() and torch.equal(*statistics)

    model = tiny_llama(query_norm="lagged").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(RuntimeError, match='"lagged" cannot be computed again'):
        model(tokens(), labels=tokens()).loss.backward()


def test_torch_checkpoints_hold_both_optimizers(tmp_path: Path) -> None:
    """As the page says: torch's function for the dense one, RowAdam's own state as it is."""
    results = []
    for resumed in (False, True):
        model = tiny_llama()
        tables = externalize_tables(model)
        dense, rows = AdamW(model.parameters(), 3e-3), RowAdam(tables, 1e-2)
        optimizer = CombinedOptimizer(dense, rows)
        if not resumed:
            train(model, optimizer)
        names = {**vars(state_dict), "DCP": DCP, "folder": tmp_path}
        names |= {"model": model, "dense": dense, "rows": rows}
        if resumed:
            names["state"] = {
                "model": state_dict.get_model_state_dict(model),
                "dense": state_dict.get_optimizer_state_dict(model, dense),
                "rows": rows.state_dict(),
            }
        _run_block("torch.distributed.checkpoint", int(resumed), names)
        train(model, optimizer)
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(memshard.train, nn.Linear(2, 2)), "train takes the run that set_up returns"),
        (partial(memshard.count_parameters, None), "a model is a torch.nn.Module, not NoneType"),
        (partial(memshard.externalize_tables, []), "a model is a torch.nn.Module, not list"),
        (partial(memshard.load_model, 3), "a model is loaded from a path, not from int"),
        (partial(memshard.load_memory, None), "a memory is loaded from a path"),
        (partial(memshard.slot_usage, None, []), "a model is a torch.nn.Module, not NoneType"),
        (
            partial(memshard.slot_usage, nn.Linear(2, 2), torch.ones(2)),
            r"several batches.*\[batch\]",
        ),
        (partial(memshard.slot_usage, nn.Linear(2, 2), {"x": torch.ones(2)}), "several batches"),
        (partial(memshard.slot_usage, nn.Linear(2, 2), None), "several batches.*not NoneType"),
        (partial(memshard.full_state_dict, None, None), "a model is a torch.nn.Module"),
        (
            partial(memshard.full_state_dict, nn.Linear(2, 2), None),
            "an optimizer is one of torch's",
        ),
        (
            partial(memshard.load_full_state_dict, nn.Linear(2, 2), None, {}, {}),
            "an optimizer is one of torch's",
        ),
    ],
)
def test_what_a_function_does_not_take_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
