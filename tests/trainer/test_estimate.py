import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from memshard.launch.cli.main import main
from memshard.models.config import FeedForwardConfig, MemoryConfig, MixerConfig, ModelConfig
from memshard.models.context import Context
from memshard.models.loss import token_losses
from memshard.models.memory.key_use import KeyUse
from memshard.models.memory.table import ValueTable, externalize_tables
from memshard.models.random import RandomKey
from memshard.models.recompute.checkpointing import Recompute
from memshard.models.transformer import Transformer
from memshard.parallel.tables.shard_tables import shard_tables
from memshard.parallel.tables.sharded import ShardedTable
from memshard.trainer.config.recipe import DataConfig, ParallelConfig, Recipe
from memshard.trainer.config.training import TrainConfig
from memshard.trainer.cost.activations import activation_bytes
from memshard.trainer.cost.alternatives import changed_by
from memshard.trainer.cost.estimate import (
    check_fits,
    count_parameters,
    estimate,
    flops_per_token,
    remedies,
    state_bytes,
)
from memshard.trainer.cost.peak_flops import peak_flops
from memshard.trainer.cost.traffic import (
    LAYOUTS,
    choose_layout,
    layout_name,
    sent_per_token,
    uniform_duplicates,
)
from tests.distributed import run_distributed
from tests.live_bytes import LiveBytes

MEMORY = MemoryConfig(layers=(1,), keys=32, heads=4, topk=8, key_dim=64)
MODEL = ModelConfig(
    vocab_size=100, max_length=64, layers=3, dim=64, mixer=MixerConfig(heads=4), memory=MEMORY
)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        replace(
            MODEL,
            memory=MemoryConfig(),
            feedforward=FeedForwardConfig(activation="swiglu"),
            vocab_size=3000,
        ),
        replace(
            MODEL,
            memory=replace(MEMORY, query_norm="rms", gate=True, value_dim=96, mode="add"),
            norm="rms",
            dropout=0.1,
        ),
        replace(
            MODEL,
            memory=replace(MEMORY, layers=(0, 1, 2), query_norm="lagged", share=True),
            residual="post",
        ),
        replace(
            MODEL,
            position="rotary",
            feedforward=FeedForwardConfig(activation="relu"),
            memory=MemoryConfig(),
            tie_head=False,
        ),
        replace(MODEL, memory=replace(MEMORY, keys=200, topk=32, query_norm="none")),
        replace(MODEL, memory=replace(MEMORY, kind="peer", topk=32)),
        replace(
            MODEL,
            memory=MemoryConfig(),
            norm="primer",
            mixer=MixerConfig(heads=4, convolution=3, share_qk=True),
            feedforward=FeedForwardConfig(activation="squared_relu", norm="after"),
        ),
        replace(
            MODEL,
            memory=MemoryConfig(),
            mixer=MixerConfig(heads=4, convolution=3, kv_heads=2),
            dropout=0.1,
        ),
    ],
)
@pytest.mark.parametrize(("document_mask", "balanced"), [(False, False), (True, True)])
def test_activations_are_what_autograd_saves(
    model: ModelConfig, half: bool, document_mask: bool, balanced: bool
) -> None:
    batch, length = 16, 64
    transformer = Transformer(model).train()
    tables = externalize_tables(transformer)
    for _, memory in transformer.memories():
        memory.key_use = KeyUse(memory.heads, model.memory.keys)
        memory.key_use.balance = float(balanced)
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in [*transformer.parameters(), *(table.weight for table in tables)]
    }
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(100, (batch, length))
    documents = torch.zeros_like(tokens) if document_mask else None
    ctx = Context(
        torch.arange(length).expand(batch, -1),
        documents,
        random=RandomKey(0, 0, torch.arange(batch)),
    )
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        token_losses(transformer(tokens, ctx)[0], tokens).sum()
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    if half:  # the copies of weights, which the estimate counts as weights
        measured -= 2 * count_parameters(model).active
    sizes = activation_bytes(
        model, length, half=half, document_mask=document_mask, key_balance=balanced
    )
    predicted = batch * length * sizes[0]
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "model",
    [
        replace(MODEL, memory=MemoryConfig(), layers=8, dropout=0.1),
        replace(
            MODEL,
            memory=replace(MEMORY, query_norm="rms", gate=True, mode="add"),
            norm="rms",
            dropout=0.1,
            tie_head=False,
        ),
        replace(MODEL, memory=replace(MEMORY, layers=(0, 1, 2), query_norm="lagged", share=True)),
    ],
)
@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize(
    ("residual", "checkpointing"),
    [("pre", "none"), ("pre", "full"), ("pre", "selective"), ("reversible", "none")],
)
def test_activations_that_are_computed_again(
    model: ModelConfig, residual: Any, checkpointing: Any, chunk: int
) -> None:
    batch, length = 16, 64
    model = replace(model, residual=residual)
    transformer = Transformer(model).train()
    transformer.configure(Recompute(checkpointing, chunk))
    externalize_tables(transformer)
    for parameter in transformer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(100, (batch, length))
    ctx = Context(
        torch.arange(length).expand(batch, -1), random=RandomKey(0, 0, torch.arange(batch))
    )
    with LiveBytes() as live:
        loss = transformer(tokens, ctx, targets=tokens)[0].sum()
        kept = live.now
        live.peak = 0
        loss.backward()
    predicted, again = (
        batch * length * size
        for size in activation_bytes(model, length, checkpointing=checkpointing, chunk=chunk)
    )
    assert predicted == pytest.approx(kept, rel=0.05)
    if again and not chunk:
        # What is held for a moment, such as gradients inside a branch, comes on top.
        assert 0.95 < live.peak / (predicted + again) < 1.4


def test_segments_hold_one_piece() -> None:
    """Losses and states of 16 pieces, of which one is computed again."""
    model = replace(
        MODEL,
        memory=MemoryConfig(),
        dim=32,
        position="none",
        mixer=MixerConfig(heads=2, kind="delta", features="dpfp"),
    )
    assert state_bytes(model) == model.layers * (
        2 * 32 * 16 * 4 + 8
    )  # matrices, and the document of the last token
    recipe = Recipe(data=DataConfig(path="", length=1024), model=model, train=TrainConfig(batch=1))
    whole = estimate(recipe, 1, 100).bytes
    pieces = estimate(replace(recipe, train=replace(recipe.train, segments=16)), 1, 100).bytes
    assert pieces.activations == 8 * 1024 + 16 * state_bytes(model)
    assert pieces.workspace == pytest.approx((whole.workspace + whole.activations) / 16)


@pytest.mark.parametrize("tie_head", [False, True])
def test_parameters_are_the_models(tie_head: bool) -> None:
    config = replace(
        MODEL, tie_head=tie_head, memory=replace(MEMORY, layers=(0, 2), share=True, gate=True)
    )
    state = torch.get_rng_state()
    parameters = count_parameters(config)
    assert torch.equal(state, torch.get_rng_state())
    model = Transformer(config)
    tables = externalize_tables(model)
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert (parameters.dense, parameters.table, parameters.tables) == (
        dense,
        tables[0].weight.numel(),
        1,
    )
    assert parameters.active == dense - 64 * 64 - (0 if tie_head else 100 * 64)


def test_paper_size_model_by_hand() -> None:
    memory = MemoryConfig(layers=(5,), keys=1024)
    recipe = Recipe(
        data=DataConfig(path="nowhere", length=512),
        model=ModelConfig(layers=16, dim=1024, memory=memory, mixer=MixerConfig(heads=16)),
        train=TrainConfig(batch=256, micro_batch=4),
        parallel=ParallelConfig(layout="rows"),
    )
    cost = estimate(recipe, 32, 50_000)
    assert cost.parameters.table == 2**30 and cost.table_part == (2**15, 1024)
    assert (
        cost.bytes.table_rows == 2**15 * 1024 * 4
        and cost.bytes.table_moments == 2 * cost.bytes.table_rows
    )
    dense = (
        50_000 * 1024 + 512 * 1024 + 16 * 4 * 1024**2 + 15 * 8 * 1024**2 + 1024 * 1024 + 1024 * 1024
    )
    assert cost.parameters.dense == pytest.approx(dense, rel=0.001)
    assert (cost.micro_batch, cost.micro_batches, cost.tokens_per_step) == (4, 2, 256 * 512)
    assert cost.flops_per_token == pytest.approx(
        6 * (dense - 512 * 1024 + 16 * 512 * 1024 + 128 * 1024), rel=0.001
    )
    assert estimate(recipe, 33, 50_000).table_part[0] * 33 >= 2**20


def test_flops_of_attention_and_lookup_count() -> None:
    longer = flops_per_token(MODEL, 64) - flops_per_token(MODEL, 32)
    assert longer == 6 * 3 * 32 * 64
    wider = replace(MODEL, memory=replace(MEMORY, topk=16))
    assert flops_per_token(wider, 64) - flops_per_token(MODEL, 64) == 6 * 4 * 8 * 64


def _sent_bytes(rank: int, world: int) -> dict[str, tuple[int, float]]:
    """Bytes that this rank really sends to others for a read of 48 tokens and its backward, and how
    often it read a row.
    """
    sent = 0
    exchange = dist.all_to_all_single

    def counted(
        out: Tensor, x: Tensor, out_sizes: list[int], in_sizes: list[int], group: dist.ProcessGroup
    ) -> Any:
        nonlocal sent
        row = x.element_size() * (x.numel() // max(len(x), 1))
        sent += row * (sum(in_sizes) - in_sizes[rank])
        return exchange(out, x, out_sizes, in_sizes, group)

    dist.all_to_all_single = counted  # type: ignore[assignment]
    found = {}
    for layout, how in LAYOUTS:
        (table,) = shard_tables(
            torch.nn.Sequential(ValueTable(slots=64, dim=36)), layout=layout, exchange=how
        )
        rows = torch.randint(64, (48, 8), generator=torch.Generator().manual_seed(rank))
        before = sent
        table.weighted_sum(rows, torch.rand(48, 8, requires_grad=True)).sum().backward()
        assert isinstance(table, ShardedTable) and table.duplicates is not None
        assert table.traffic.reads == pytest.approx(sent - before, rel=0.01)
        found[layout_name(layout, how)] = (table.traffic.reads, table.duplicates)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_traffic_is_what_the_ranks_send(world: int) -> None:
    for found in run_distributed(_sent_bytes, world):
        for layout, how in LAYOUTS:
            counted, duplicates = found[layout_name(layout, how)]
            # Rows do not divide by 3, so ranks differ a little.
            predicted = 48 * sent_per_token(layout, how, world, 36, 8, duplicates)
            assert counted == pytest.approx(predicted, rel=0.05), (layout, how)
    assert all(sent_per_token(layout, how, 1, 16, 8) == 0 for layout, how in LAYOUTS)


@pytest.mark.parametrize(
    ("ranks", "duplicates", "expected"),
    [
        (2, 1.0, "columns"),
        (64, 1.0, "rows, pooled"),
        (64, 16.0, "rows, unique"),
        (8, 16.0, "columns"),
    ],
)
def test_the_layout_that_sends_least_is_chosen(
    ranks: int, duplicates: float, expected: str
) -> None:
    choice = choose_layout("auto", "auto", ranks, 1024, 128, duplicates)
    assert choice.name == expected and expected in choice.reason
    others = {**choice.sent, "columns": float("inf")} if choice.name != "columns" else choice.sent
    assert choice.sent[expected] == min(others.values())


def test_a_recipe_can_ask_for_a_layout() -> None:
    assert choose_layout("rows", "auto", 2, 1024, 128, 1.0).name == "rows, pooled"
    assert choose_layout("auto", "unique", 2, 1024, 128, 1.0).name == "rows, unique"
    assert choose_layout("columns", "auto", 64, 64, 128, 1.0).name == "columns"


@pytest.mark.parametrize(
    ("reads", "measured"),
    [(256 * 128, 1.1), (1024 * 128, 1.3), (4096 * 128, 2.5), (8192 * 128, 4.3)],
)
def test_duplicates_of_batch_normalised_queries(reads: int, measured: float) -> None:
    """Against reads of a 512^2 memory that were counted."""
    assert uniform_duplicates(reads, 512**2) == pytest.approx(measured, rel=0.1)


RECIPE = Recipe(
    data=DataConfig(path="nowhere"),
    model=replace(MODEL, max_length=None),
    train=TrainConfig(batch=64),
)


def test_a_table_that_does_not_fit_is_refused_before_anything_is_allocated() -> None:
    check_fits(RECIPE, 1, 100, torch.device("cpu"))
    huge = replace(
        RECIPE, model=replace(MODEL, max_length=None, memory=replace(MEMORY, keys=100_000))
    )
    with pytest.raises(
        ValueError,
        match=r"the value table needs 7,68\d\.\d GB a rank .*lower model.memory.keys, or use more "
        r"ranks",
    ):
        check_fits(huge, 1, 100, torch.device("cpu"))


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(RECIPE, model=replace(MODEL, max_length=None, memory=replace(MEMORY, keys=128)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    with pytest.raises(ValueError, match="the value table needs"):
        check_fits(small, 1, 100, torch.device("cpu"))


def test_every_remedy_works() -> None:
    available = estimate(RECIPE, 1, 100).bytes.total / 2
    found = remedies(RECIPE, 1, 100, False, available)
    assert any("ranks" in remedy for remedy in found)
    for remedy in found:
        changed, ranks = RECIPE, 1
        if "ranks" in remedy:
            ranks = int(remedy.split()[1])
        elif "keys" in remedy:
            changed = replace(
                RECIPE,
                model=replace(
                    RECIPE.model, memory=replace(MEMORY, keys=int(remedy.rpartition("=")[2]))
                ),
            )
        elif "place" in remedy:
            changed = replace(RECIPE, tables=replace(RECIPE.tables, place="host"))
        else:
            values = dict(text.split("=") for text in remedy.split()[1:])
            changed = changed_by(
                RECIPE,
                {key: int(value) if value.isdigit() else value for key, value in values.items()},
            )
        assert estimate(changed, ranks, 100).bytes.total <= available, remedy
    assert remedies(RECIPE, 1, 100, False, 1000) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_a_plausible_number_of_this_machine(dtype: torch.dtype) -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), dtype) < 1e14


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    text = (
        "data: {path: nowhere}\nmodel: {layers: 3, dim: 64, memory: {layers: [1], keys: "
        "64}}\ntrain: {batch: 64}\n"
    )
    (tmp_path / "small.yaml").write_text(text)
    return str(tmp_path / "small.yaml")


def test_plan_prints_a_table_and_says_what_to_change(
    recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe_file, "--world", "8", "--device", "v100-16g"]) == 0
    out = capsys.readouterr().out
    assert "fits" in out and "32,768" in out and "vocabulary" in out
    assert (
        main(
            ["plan", recipe_file, "model.memory.keys=8192", "--world", "1", "--device", "v100-16g"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "does not fit" in out and "ranks" in out and "model.memory.keys=" in out


def test_plan_as_json(recipe_file: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "plan",
                recipe_file,
                "--world",
                "2",
                "--device",
                "a100-80g",
                "--vocab",
                "1000",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capfd.readouterr().out)
    assert result["fits"] is True and result["vocab_size"] == 1000
    assert (
        result["parameters"]["table"] == 64 * 64 * 64
        and result["bytes"]["table_rows"] == 64 * 64 * 64 * 4 / 2
    )
    assert result["bytes"]["total"] == pytest.approx(
        sum(value for name, value in result["bytes"].items() if name != "total")
    )


def test_plan_refuses_no_ranks(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe_file, "--world", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_zero_splits_the_moments_down_to_the_largest_parameter() -> None:
    recipe = Recipe(
        data=DataConfig(path="nowhere"),
        model=replace(MODEL, vocab_size=1000),
        train=TrainConfig(batch=64, zero=1),
    )
    parameters = count_parameters(replace(MODEL, vocab_size=1000))
    assert parameters.largest == 64 * 1000
    assert estimate(recipe, 2, 0).bytes.dense_moments == parameters.dense * 4
    assert estimate(recipe, 64, 0).bytes.dense_moments == 64_000 * 8
    assert (
        estimate(replace(recipe, train=TrainConfig(batch=64)), 64, 0).bytes.dense_moments
        == parameters.dense * 8
    )


def test_deepspeed_splits_masters_and_moments_and_offload_moves_them() -> None:
    def of(half: bool, **settings: Any) -> tuple[Any, Any]:
        train = TrainConfig(batch=64, engine="deepspeed", **settings)
        cost = estimate(
            Recipe(
                data=DataConfig(path="nowhere"), model=replace(MODEL, vocab_size=1000), train=train
            ),
            4,
            0,
            half,
        )
        return cost.bytes, cost.host

    dense = count_parameters(replace(MODEL, vocab_size=1000)).dense
    sums = 2 * 2 * dense
    first, _ = of(True, zero=1)
    assert first.dense == dense * (2 + 1 + 2 + 1 + 2) + sums
    second, _ = of(True, zero=2)
    assert first.dense - second.dense == dense * 2 * 3 / 4
    device, host = of(True, zero=2, offload=True)
    assert host.dense == dense * 4 and device.dense == second.dense - host.dense - sums / 2
    assert of(False, zero=0)[0].dense == dense * 16
